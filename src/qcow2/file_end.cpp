#include "qcow2/file_end.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/endian.h"
#include "base/try.h"
#include "format/refcount.h"

namespace qcow::qcow2 {
namespace {

constexpr unsigned max_blocks = 16;

Result<std::uint64_t> find_counted_end(const Core& core) {
    const auto header = core.current_header();
    const unsigned cluster_bits = core.header.cluster_bits;
    const std::uint64_t file_size = TRY(core.file->size());
    TRY_VOID(format::verify_refcount_table(header, cluster_bits, file_size));
    std::vector<std::byte> table(std::size_t{header.refcount_table_clusters} << cluster_bits);
    TRY(core.file->read(header.refcount_table, table));

    const unsigned order = core.header.refcount_order;
    const std::uint64_t per_block = format::refcounts_per_block(cluster_bits, order);
    std::vector<std::byte> block(core.header.cluster_size());
    unsigned looked_at = 0;
    for (std::size_t i = table.size() / 8; i-- > 0 && looked_at < max_blocks;) {
        const format::RefcountTableEntry entry{load_be<std::uint64_t>(table, i * 8)};
        if (!entry.allocated()) continue;
        const std::uint64_t first = i * per_block;
        if (first >= format::max_host_offset >> cluster_bits) break;
        // A block that was cut off counted something, its own cluster at least.
        if (!lies_within(entry.block().value, block.size(), file_size))
            return std::max((first + 1) << cluster_bits, std::min(entry.block().value, format::max_host_offset));
        TRY(core.file->read(entry.block(), block));
        for (std::uint64_t n = per_block; n-- > 0;) {
            if (format::refcount_at(block, n, order) == 0) continue;
            return std::min(first + n + 1, format::max_host_offset >> cluster_bits) << cluster_bits;
        }
        ++looked_at;
    }
    return fail(Errc::corrupt, "refcounts", "nothing is counted");
}

}  // namespace

std::optional<std::uint64_t> counted_end(const Core& core) {
    std::call_once(core.counted_end_once, [&] {
        if (const auto found = find_counted_end(core)) core.counted_end = *found;
    });
    return core.counted_end;
}

bool is_l1_left_out(const Core& core) {
    const auto& header = core.header;
    const auto file_size = core.file->size();
    if (!file_size) return false;
    const std::uint64_t l1_end = header.l1_table.value + std::uint64_t{header.l1_entries} * 8;
    const std::uint64_t file_end = divide_up(*file_size, header.cluster_size()) * header.cluster_size();
    if (l1_end <= *file_size || header.l1_table.value > file_end) return false;
    const auto counted = counted_end(core);
    return counted && *counted <= std::max(file_end, divide_up(l1_end, header.cluster_size()) * header.cluster_size());
}

std::string past_the_end(const Core& core, const Storage& file, std::string_view thing, HostOffset at) {
    const auto file_size = file.size().value_or(0);
    auto text = fmt::format("{} would lie at host offset {:#x}, past the end of the file ({} bytes): the file was cut",
                            thing, at.value, file_size);
    if (&file != core.file.get()) return text;
    const auto counted = counted_end(core);
    if (counted && *counted > file_size) {
        text += fmt::format(", the complete one has about {} bytes", *counted);
    } else if (counted) {
        text += ", or what leads there is damaged";
    }
    return text;
}

}  // namespace qcow::qcow2
