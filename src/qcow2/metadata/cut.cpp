// Cutting off what a smaller disk no longer needs at the end of its file.

#include <algorithm>
#include <set>

#include "base/try.h"
#include "format/refcount.h"
#include "qcow2/metadata/writable_metadata.h"

namespace qcow::qcow2 {
namespace {

/// How many refcounts a block has up to its last one that is not 0.
std::uint64_t counted_end(std::span<const std::byte> block, unsigned order) {
    std::size_t bytes = block.size();
    while (bytes > 0 && block[bytes - 1] == std::byte{0}) --bytes;
    std::uint64_t end = divide_up(bytes * 8, bit(order));
    while (end > 0 && format::refcount_at(block, end - 1, order) == 0) --end;
    return end;
}

/// Works on the file alone, in which all refcounts have been written: nobody else may be changing it.
class Cut {
public:
    Cut(Metadata& metadata, WriteBack& write_back, MetadataMap& map)
        : metadata_(metadata),
          write_back_(write_back),
          map_(map),
          cluster_size_(metadata.header().cluster_size()),
          order_(metadata.header().refcount_order),
          per_block_(format::refcounts_per_block(metadata.header().cluster_bits, order_)) {}

    Result<void> run() {
        TRY_VOID(find_end());
        const std::uint64_t file_size = TRY(metadata_.file().size());
        // What somebody put behind the last counted cluster is not cut off.
        if (divide_up(file_size, cluster_size_) > counted_end_) return {};
        TRY_VOID(drop_blocks());
        // Whatever the refcounts say.
        const std::uint64_t end = std::max(end_, map_.end()) * cluster_size_;
        if (file_size > end) TRY_VOID(metadata_.file().resize(end));
        return write_back_.sync();
    }

private:
    Result<std::vector<std::byte>> load_block(std::uint64_t index) const {
        std::vector<std::byte> block(cluster_size_);
        TRY(metadata_.file().read({table_[index]}, block));
        return block;
    }

    /// Takes the refcounts of what is dropped out of a block.
    void clear_dropped(std::span<std::byte> block, std::uint64_t index) const {
        const auto first = index * per_block_;
        for (auto at = dropped_.lower_bound(first); at != dropped_.end() && *at < first + per_block_; ++at)
            format::set_refcount(block, *at - first, order_, 0);
    }

    /// The cluster behind the last one that a block counts; 0: there is none.
    [[nodiscard]] std::uint64_t end_in(std::span<const std::byte> block, std::uint64_t index) const {
        const auto counted = counted_end(block, order_);
        return counted == 0 ? 0 : index * per_block_ + counted;
    }

    /// Finds the last cluster in use, and the refcount blocks that count nothing behind it but themselves.
    Result<void> find_end() {
        const auto header = metadata_.state();
        std::vector<std::byte> bytes(header.refcount_table_clusters * cluster_size_);
        TRY(metadata_.file().read(header.refcount_table, bytes));
        for (std::size_t at = 0; at < bytes.size(); at += 8)
            table_.push_back(format::RefcountTableEntry{load_be<std::uint64_t>(bytes, at)}.block().value);
        for (std::uint64_t index = table_.size(); index-- > 0 && end_ == 0;) {
            if (table_[index] == 0) continue;
            const std::uint64_t own = table_[index] / cluster_size_;
            auto block = TRY(load_block(index));
            counted_end_ = std::max(counted_end_, end_in(block, index));
            clear_dropped(block, index);
            auto without_itself = block;
            dropped_.insert(own);
            clear_dropped(without_itself, index);
            if (end_in(without_itself, index) == 0) {
                indices_.push_back(index);
            } else {
                dropped_.erase(own);
                end_ = end_in(block, index);
            }
        }
        return {};
    }

    /// First nothing leads to them, then they are free.
    Result<void> drop_blocks() {
        if (indices_.empty()) return {};
        const auto table = metadata_.state().refcount_table;
        for (const auto index : indices_) {
            TRY_VOID(metadata_.file().write(table + index * 8, std::array<std::byte, 8>{}));
            map_.remove({table_[index]}, cluster_size_);
            table_[index] = 0;
        }
        TRY_VOID(write_back_.sync());
        for (auto at = dropped_.begin(); at != dropped_.end();) {
            const std::uint64_t index = *at / per_block_;
            if (index < table_.size() && table_[index] != 0) {
                auto block = TRY(load_block(index));
                clear_dropped(block, index);
                TRY_VOID(metadata_.file().write({table_[index]}, block));
            }
            at = dropped_.lower_bound((index + 1) * per_block_);
        }
        return {};
    }

    Metadata& metadata_;
    WriteBack& write_back_;
    MetadataMap& map_;
    const std::uint64_t cluster_size_;
    const unsigned order_;
    const std::uint64_t per_block_;
    std::vector<std::uint64_t> table_;    // of refcount blocks: host offsets
    std::vector<std::uint64_t> indices_;  // in the table, of the blocks that are dropped
    std::set<std::uint64_t> dropped_;     // clusters in which these lie
    std::uint64_t counted_end_ = 0;       // cluster behind the last one that is counted
    std::uint64_t end_ = 0;               // and behind the last one that will be
};

}  // namespace

Result<void> WritableMetadata::cut_file() {
    return attempt([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        return Cut(metadata_, write_back_, map_).run();
    });
}

}  // namespace qcow::qcow2
