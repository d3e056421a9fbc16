#include "qcow2/bitmap_runs.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "base/try.h"
#include "qcow/text.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t bitmap_piece_bytes = 64 * KiB;

std::string place_of(const Metadata& metadata, const format::BitmapEntry& bitmap) {
    return fmt::format("{}: bitmap \"{}\" (table at host offset {:#x})", metadata.file().name(),
                       printable(bitmap.info.name), bitmap.table.value);
}

}  // namespace

Result<void> verify_bitmap(const Metadata& metadata, const format::BitmapEntry& bitmap) {
    const auto bad = [&](std::string what) { return fail(Errc::corrupt, place_of(metadata, bitmap), std::move(what)); };
    if (!bitmap.understood)
        return fail(Errc::unsupported, place_of(metadata, bitmap), "it has extra data that have to be understood");
    const auto cluster_size = metadata.header().cluster_size();
    const auto needed = divide_up(divide_up(metadata.state().size, bitmap.info.granularity), cluster_size * 8);
    if (bitmap.table_entries != needed)
        return bad(fmt::format("its table has {} entries, but the disk needs {}", bitmap.table_entries, needed));
    if (!is_aligned(bitmap.table.value, cluster_size))
        return bad("the table's offset is not a multiple of the cluster size");
    const auto file_size = TRY(metadata.addressable_bytes());
    if (!lies_within(bitmap.table.value, std::uint64_t{bitmap.table_entries} * 8, file_size))
        return bad(fmt::format("the table reaches past the end of the file ({} bytes)", file_size));
    return {};
}

Result<format::BitmapTableEntry> bitmap_table_entry(const Metadata& metadata, const format::BitmapEntry& bitmap,
                                                    std::uint64_t index) {
    const format::BitmapTableEntry entry{TRY(metadata.words().load(bitmap.table + index * 8))};
    const auto bad = [&](std::string what) {
        return fail(Errc::corrupt, fmt::format("{}: table entry {}", place_of(metadata, bitmap), index),
                    std::move(what));
    };
    if (entry.reserved_bits_set()) return bad(fmt::format("reserved bits are set ({:#x})", entry.word));
    const auto cluster = entry.cluster().value;
    if (cluster == 0) return entry;
    const auto cluster_size = metadata.header().cluster_size();
    if (!is_aligned(cluster, cluster_size))
        return bad(fmt::format("host offset {:#x} is not a multiple of the cluster size", cluster));
    const auto file_end = divide_up(TRY(metadata.addressable_bytes()), cluster_size) * cluster_size;
    if (!lies_within(cluster, cluster_size, file_end))
        return bad(fmt::format("the cluster at {:#x} lies past the end of the file", cluster));
    return entry;
}

Result<void> each_dirty_run(const Metadata& metadata, const format::BitmapEntry& bitmap, const RecordedBits* recorded,
                            GuestOffset begin, std::uint64_t length,
                            const std::function<Result<void>(const DirtyRun&)>& visit) {
    if (length == 0) return {};
    const unsigned granularity_bits = bitmap.granularity_bits;
    const GuestOffset end = begin + length;
    const std::uint64_t first_bit = begin.value >> granularity_bits;
    const std::uint64_t end_bit = divide_up(end.value, bitmap.info.granularity);
    const std::uint64_t cluster_words = metadata.header().cluster_size() / 8;
    DirtyRun run{begin, 0, false};
    std::vector<std::byte> bytes;
    for (std::uint64_t word = first_bit / 64; word * 64 < end_bit;) {
        const auto index = word / cluster_words;
        const auto words_end =
            std::min({(index + 1) * cluster_words, divide_up(end_bit, 64), word + bitmap_piece_bytes / 8});
        const auto entry = TRY(bitmap_table_entry(metadata, bitmap, index));
        bytes.assign((words_end - word) * 8, entry.all_ones() ? std::byte{0xff} : std::byte{0});
        if (entry.cluster().value != 0) TRY(metadata.file().read(entry.cluster() + word % cluster_words * 8, bytes));
        for (std::size_t i = 0; word < words_end; ++word, ++i) {
            std::uint64_t bits = load_bits(bytes, i);
            if (recorded != nullptr) bits |= (*recorded)[word].load(std::memory_order_relaxed);
            const auto stop = static_cast<unsigned>(std::min<std::uint64_t>(64, end_bit - word * 64));
            for (unsigned n = word == first_bit / 64 ? first_bit % 64 : 0; n < stop;) {
                const bool dirty = (bits >> n & 1) != 0;
                const int alike = dirty ? std::countr_one(bits >> n) : std::countr_zero(bits >> n);
                n = std::min(stop, n + static_cast<unsigned>(alike));
                if (run.dirty != dirty && run.length != 0) {
                    TRY_VOID(visit(run));
                    run = {run.start + run.length, 0, dirty};
                }
                run.dirty = dirty;
                const auto next_bit = word * 64 + n;
                const GuestOffset run_end = next_bit >= end_bit ? end : GuestOffset{next_bit << granularity_bits};
                run.length = run_end - run.start;
            }
        }
    }
    return visit(run);
}

}  // namespace qcow::qcow2
