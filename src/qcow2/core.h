#pragma once
// What the parts of an opened qcow2 image share.

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "disk/below.h"
#include "format/header.h"
#include "format/mapping.h"
#include "storage/word_cache.h"

namespace qcow {

struct Core {
    Core(format::Header parsed, std::shared_ptr<Storage> image_file, std::shared_ptr<Storage> external_data,
         std::shared_ptr<Layer> backing, std::size_t cache_budget, bool alone = false)
        : header(std::move(parsed)),
          rules{format::Geometry(header), header.version, header.has(format::incompatible::external_data)},
          file(std::move(image_file)),
          data(rules.external_data ? std::move(external_data) : file),
          below(std::move(backing), alone ? std::string() : header.backing_name),
          cache_bytes(cache_budget),
          words(file, std::min<std::uint64_t>(header.cluster_size(), 4096), cache_budget) {}

    /// What may change while requests are in flight (size, tables, features) is read through this. The rest of the
    /// header never changes, and is read without a lock.
    [[nodiscard]] format::HeaderState current_header() const {
        const std::lock_guard lock(header_mutex);
        return header;
    }
    void replace_header(const format::HeaderState& changed) {
        const std::lock_guard lock(header_mutex);
        static_cast<format::HeaderState&>(header) = changed;
    }

    mutable std::mutex header_mutex;
    format::Header header;  // of an image that is open for writing: the writer's, see above
    format::EntryRules rules;
    std::shared_ptr<Storage> file;  // metadata, and data unless that is external
    std::shared_ptr<Storage> data;  // null: an external data file that was not opened
    Below below;
    std::size_t cache_bytes;  // this layer's share of the budget
    mutable WordCache words;
    mutable std::atomic<std::uint64_t> known_file_size = 0;  // the file has at least this many bytes
    bool l1_left_out = false;  // the file ends before the L1 table does, and the rest of it is zeros

    mutable std::once_flag counted_end_once;
    mutable std::optional<std::uint64_t> counted_end;  // see file_end.h
};

}  // namespace qcow
