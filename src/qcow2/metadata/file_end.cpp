#include "qcow2/metadata/file_end.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"
#include "format/entries.h"
#include "format/refcount.h"

namespace qcow::qcow2 {
namespace {

constexpr unsigned max_blocks = 16;

/// The end of the file's last cluster. What the file lacks there reads as zeros.
Result<std::uint64_t> end_of_clusters(const Storage& file, const format::FixedHeader& header) {
    return divide_up(TRY(file.size()), header.cluster_size()) * header.cluster_size();
}

/// The refcount table, which lies within the limits and the file.
Result<std::vector<std::byte>> read_refcount_table(const Storage& file, const format::FixedHeader& header,
                                                   const format::HeaderState& state) {
    TRY_VOID(format::verify_refcount_table(state, header.cluster_bits, TRY(end_of_clusters(file, header))));
    std::vector<std::byte> table(std::size_t{state.refcount_table_clusters} << header.cluster_bits);
    TRY(file.read(state.refcount_table, table));
    return table;
}

}  // namespace

Result<std::uint64_t> find_counted_end(const Storage& file, const format::FixedHeader& header,
                                       const format::HeaderState& state) {
    const unsigned cluster_bits = header.cluster_bits;
    const std::uint64_t file_size = TRY(end_of_clusters(file, header));
    const auto table = TRY(read_refcount_table(file, header, state));

    const unsigned order = header.refcount_order;
    const std::uint64_t per_block = format::refcounts_per_block(cluster_bits, order);
    std::vector<std::byte> block(header.cluster_size());
    unsigned looked_at = 0;
    for (std::size_t i = table.size() / 8; i-- > 0 && looked_at < max_blocks;) {
        const format::RefcountTableEntry entry{load_be<std::uint64_t>(table, i * 8)};
        if (!entry.allocated()) continue;
        const std::uint64_t first = i * per_block;
        if (first >= format::max_host_offset >> cluster_bits) break;
        // A block that was cut off counted something, its own cluster at least.
        if (!lies_within(entry.block().value, block.size(), file_size))
            return std::max((first + 1) << cluster_bits, std::min(entry.block().value, format::max_host_offset));
        TRY(file.read(entry.block(), block));
        for (std::uint64_t n = per_block; n-- > 0;) {
            if (format::refcount_at(block, n, order) == 0) continue;
            return std::min(first + n + 1, format::max_host_offset >> cluster_bits) << cluster_bits;
        }
        ++looked_at;
    }
    return fail(Errc::corrupt, "refcounts", "nothing is counted");
}

Result<bool> counts_no_data(const Storage& file, const format::FixedHeader& header, const format::HeaderState& state) {
    const unsigned cluster_bits = header.cluster_bits;
    const std::uint64_t file_size = TRY(end_of_clusters(file, header));
    // What these lie in would be counted, too. A dirty image may have data that are not counted.
    if (state.snapshot_count != 0 || state.bitmaps || header.encryption || state.has(format::incompatible::dirty))
        return false;
    const auto table = TRY(read_refcount_table(file, header, state));

    std::set<std::uint64_t> expected{0};
    const auto expect = [&](HostOffset at, std::uint64_t bytes) {
        const std::uint64_t first = at.value >> cluster_bits;
        for (std::uint64_t n = 0; n < divide_up(bytes, header.cluster_size()); ++n) expected.insert(first + n);
    };
    expect(state.refcount_table, table.size());
    expect(state.l1_table, std::uint64_t{state.l1_entries} * 8);
    std::vector<std::pair<std::uint64_t, HostOffset>> blocks;  // with the index in the table
    for (std::size_t i = 0; i < table.size() / 8; ++i) {
        const format::RefcountTableEntry entry{load_be<std::uint64_t>(table, i * 8)};
        if (!entry.allocated()) continue;
        if (blocks.size() == max_blocks || !lies_within(entry.block().value, header.cluster_size(), file_size))
            return false;
        blocks.emplace_back(i, entry.block());
        expect(entry.block(), header.cluster_size());
    }

    const unsigned order = header.refcount_order;
    const std::uint64_t per_block = format::refcounts_per_block(cluster_bits, order);
    const std::uint64_t per_word = 64 >> order;
    std::vector<std::byte> block(header.cluster_size());
    for (const auto& [index, at] : blocks) {
        TRY(file.read(at, block));
        for (std::uint64_t n = 0; n < per_block; ++n) {
            if (n % per_word == 0 && load_be<std::uint64_t>(block, n / per_word * 8) == 0) {
                n += per_word - 1;
            } else if (format::refcount_at(block, n, order) != 0 && !expected.contains(index * per_block + n)) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace qcow::qcow2
