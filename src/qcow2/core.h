#pragma once
// What the parts of an opened qcow2 image share.

#include <memory>

#include "disk/below.h"
#include "format/header.h"
#include "format/mapping.h"
#include "storage/word_cache.h"

namespace qcow {

struct Core {
    Core(format::Header parsed, std::shared_ptr<Storage> image_file, std::shared_ptr<Storage> external_data,
         std::shared_ptr<Image> backing, std::size_t cache_bytes)
        : header(std::move(parsed)),
          rules{format::Geometry(header), header.version, header.has(format::incompatible::external_data)},
          file(std::move(image_file)),
          data(rules.external_data ? std::move(external_data) : file),
          below(std::move(backing), header.backing_name),
          words(file, std::min<std::uint64_t>(header.cluster_size(), 4096), cache_bytes) {}

    format::Header header;
    format::EntryRules rules;
    std::shared_ptr<Storage> file;  // metadata, and data unless that is external
    std::shared_ptr<Storage> data;  // null: an external data file that was not opened
    Below below;
    mutable WordCache words;
};

}  // namespace qcow
