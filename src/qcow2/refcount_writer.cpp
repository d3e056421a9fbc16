#include "qcow2/refcount_writer.h"

#include <algorithm>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"
#include "format/refcount.h"
#include "qcow2/layout.h"

namespace qcow::qcow2 {

RefcountWriter::RefcountWriter(Storage& file, unsigned cluster_bits, unsigned refcount_order)
    : file_(file),
      cluster_bits_(cluster_bits),
      order_(refcount_order),
      per_block_(format::refcounts_per_block(cluster_bits, refcount_order)) {}

std::vector<std::byte>& RefcountWriter::block_of(std::uint64_t cluster) {
    auto& block = open_blocks_[cluster / per_block_];
    if (block.empty()) block.resize(bit(cluster_bits_));
    return block;
}

HostOffset RefcountWriter::allocate(std::uint64_t clusters) {
    const HostOffset begin = end();
    while (clusters > 0) {
        auto& block = block_of(next_);
        const std::uint64_t first = next_ % per_block_;
        const std::uint64_t piece = std::min(clusters, per_block_ - first);
        for (std::uint64_t i = first; i < first + piece; ++i) format::set_refcount(block, i, order_, 1);
        next_ += piece;
        clusters -= piece;
    }
    return begin;
}

void RefcountWriter::add_reference(HostOffset cluster) {
    const std::uint64_t number = cluster.value >> cluster_bits_;
    auto& block = block_of(number);
    const std::uint64_t index = number % per_block_;
    format::set_refcount(block, index, order_, format::refcount_at(block, index, order_) + 1);
}

Result<void> RefcountWriter::write_block(std::uint64_t index, HostOffset at) {
    table_.resize(std::max<std::size_t>(table_.size(), index + 1));
    table_[index] = at.value;
    TRY_VOID(file_.write(at, open_blocks_.at(index)));
    open_blocks_.erase(index);
    return {};
}

Result<void> RefcountWriter::write_blocks_below(HostOffset settled) {
    const std::uint64_t complete = std::min(settled, end()).value >> cluster_bits_;
    while (!open_blocks_.empty() && (open_blocks_.begin()->first + 1) * per_block_ <= complete) {
        TRY_VOID(write_block(open_blocks_.begin()->first, allocate(1)));
    }
    return {};
}

Result<RefcountWriter::Table> RefcountWriter::finish() {
    TRY_VOID(write_blocks_below(end()));
    const std::uint64_t cluster_size = bit(cluster_bits_);
    const std::uint64_t written = table_.size();
    const auto refcounts = refcount_clusters(next_ - written, cluster_bits_, order_);
    TRY_VOID(verify_refcounts_fit(refcounts, cluster_bits_));
    const std::uint64_t blocks = refcounts.blocks - written;
    const HostOffset first_block = allocate(blocks);
    const HostOffset table = allocate(refcounts.table);
    for (std::uint64_t i = 0; i < blocks; ++i) TRY_VOID(write_block(written + i, first_block + i * cluster_size));

    std::vector<std::byte> bytes(refcounts.table * cluster_size);
    for (std::size_t i = 0; i < table_.size(); ++i) store_be(bytes, i * 8, table_[i]);
    TRY_VOID(file_.write(table, bytes));
    return Table{table, static_cast<std::uint32_t>(refcounts.table)};
}

}  // namespace qcow::qcow2
