#include "format/tables.h"

#include <fmt/format.h>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow::format {
namespace {

constexpr std::uint8_t dirty_tracking = 1;  // the type of all bitmaps that there are

void append(std::vector<std::byte>& bytes, std::string_view text) {
    const auto more = as_bytes(text);
    bytes.insert(bytes.end(), more.begin(), more.end());
}

std::unexpected<Error> too_short(std::size_t needed, std::size_t there) {
    return fail(
        Errc::corrupt, "",
        fmt::format("an entry of {} bytes does not fit in the {} bytes that are left of the table", needed, there));
}

}  // namespace

Result<SnapshotEntry> parse_snapshot(std::span<const std::byte> in, unsigned version, std::uint64_t disk_size) {
    constexpr std::size_t fixed = 40;
    if (in.size() < fixed) return too_short(fixed, in.size());
    SnapshotEntry entry;
    entry.l1_table = {load_be<std::uint64_t>(in, 0)};
    entry.l1_entries = load_be<std::uint32_t>(in, 8);
    const std::size_t id_length = load_be<std::uint16_t>(in, 12);
    const std::size_t name_length = load_be<std::uint16_t>(in, 14);
    entry.info.date_seconds = load_be<std::uint32_t>(in, 16);
    entry.info.date_nanoseconds = load_be<std::uint32_t>(in, 20);
    entry.info.vm_clock_nanoseconds = load_be<std::uint64_t>(in, 24);
    entry.info.vm_state_bytes = load_be<std::uint32_t>(in, 32);
    entry.info.virtual_size = disk_size;
    const std::size_t extra_length = load_be<std::uint32_t>(in, 36);

    const std::size_t total = fixed + extra_length + id_length + name_length;
    if (total > max_snapshot_bytes)
        return fail(Errc::corrupt, "", fmt::format("an entry of {} bytes is longer than 1 MiB", total));
    if (total > in.size()) return too_short(total, in.size());
    if (version >= 3 && extra_length < min_snapshot_extra_bytes) {
        return fail(Errc::corrupt, "",
                    fmt::format("{} bytes of extra data, but version 3 needs at least {}", extra_length,
                                min_snapshot_extra_bytes));
    }
    const auto extra = in.subspan(fixed, extra_length);
    if (extra_length >= 8) entry.info.vm_state_bytes = load_be<std::uint64_t>(extra, 0);
    if (extra_length >= 16) entry.info.virtual_size = load_be<std::uint64_t>(extra, 8);
    if (extra_length >= 24) {
        if (const auto icount = load_be<std::uint64_t>(extra, 16); icount != ~std::uint64_t{0})
            entry.info.icount = icount;
    }
    entry.info.id = as_text(in.subspan(fixed + extra_length, id_length));
    entry.info.name = as_text(in.subspan(fixed + extra_length + id_length, name_length));
    entry.extra_bytes = static_cast<std::uint32_t>(extra_length);
    entry.encoded_bytes = std::min<std::size_t>(align_down(total + 7, 8), in.size());
    return entry;
}

std::vector<std::byte> encode_snapshot(const SnapshotEntry& entry) {
    const auto& info = entry.info;
    constexpr std::size_t fixed = 40;
    constexpr std::size_t extra = 24;
    std::vector<std::byte> bytes(fixed + extra);
    store_be(bytes, 0, entry.l1_table.value);
    store_be(bytes, 8, entry.l1_entries);
    store_be(bytes, 12, static_cast<std::uint16_t>(info.id.size()));
    store_be(bytes, 14, static_cast<std::uint16_t>(info.name.size()));
    store_be(bytes, 16, static_cast<std::uint32_t>(info.date_seconds));
    store_be(bytes, 20, info.date_nanoseconds);
    store_be(bytes, 24, info.vm_clock_nanoseconds);
    store_be(bytes, 32, static_cast<std::uint32_t>(info.vm_state_bytes));
    store_be(bytes, 36, static_cast<std::uint32_t>(extra));
    store_be(bytes, fixed, info.vm_state_bytes);
    store_be(bytes, fixed + 8, info.virtual_size);
    store_be(bytes, fixed + 16, info.icount.value_or(~std::uint64_t{0}));
    append(bytes, info.id);
    append(bytes, info.name);
    bytes.resize(align_down(bytes.size() + 7, 8));
    return bytes;
}

std::vector<std::byte> rename_snapshot(std::span<const std::byte> encoded, std::string_view name) {
    constexpr std::size_t fixed = 40;
    const std::size_t head = fixed + load_be<std::uint32_t>(encoded, 36) + load_be<std::uint16_t>(encoded, 12);
    std::vector<std::byte> bytes(encoded.begin(), encoded.begin() + static_cast<std::ptrdiff_t>(head));
    store_be(bytes, 14, static_cast<std::uint16_t>(name.size()));
    append(bytes, name);
    bytes.resize(align_down(bytes.size() + 7, 8));
    return bytes;
}

std::vector<std::byte> encode_bitmap(const BitmapEntry& entry) {
    const auto& name = entry.info.name;
    std::vector<std::byte> bytes(BitmapEntry::encoded_size(name.size(), 0));
    store_be(bytes, 0, entry.table.value);
    store_be(bytes, BitmapEntry::table_entries_at, entry.table_entries);
    store_be(bytes, BitmapEntry::flags_at, entry.flags);
    bytes[16] = std::byte{dirty_tracking};
    bytes[17] = static_cast<std::byte>(entry.granularity_bits);
    store_be(bytes, 18, static_cast<std::uint16_t>(name.size()));
    std::ranges::copy(as_bytes(name), bytes.begin() + BitmapEntry::fixed_bytes);
    return bytes;
}

std::string_view BitmapEntry::refusal() const {
    if (granularity_bits < min_granularity_bits || granularity_bits > max_granularity_bits)
        return "its granularity is not 512 bytes to 2 GiB";
    if (info.name.empty() || info.name.size() > max_name_length) return "its name does not have 1 to 1023 bytes";
    if (extra_data_bytes != 0 || (flags & extra_data_compatible_flag) != 0)
        return "it has extra data, or the flag for them";
    return {};
}

BitmapEntry BitmapEntry::without_ignorable_data() const {
    BitmapEntry entry = *this;
    if (!understood) return entry;
    entry.extra_data_bytes = 0;
    entry.flags &= ~extra_data_compatible_flag;
    return entry;
}

Result<BitmapEntry> parse_bitmap(std::span<const std::byte> in) {
    constexpr std::size_t fixed = BitmapEntry::fixed_bytes;
    if (in.size() < fixed) return too_short(fixed, in.size());
    BitmapEntry entry;
    entry.table = {load_be<std::uint64_t>(in, 0)};
    entry.table_entries = load_be<std::uint32_t>(in, 8);
    entry.flags = load_be<std::uint32_t>(in, BitmapEntry::flags_at);
    const auto type = static_cast<std::uint8_t>(in[16]);
    entry.granularity_bits = static_cast<std::uint8_t>(in[17]);
    const std::size_t name_length = load_be<std::uint16_t>(in, 18);
    entry.extra_data_bytes = load_be<std::uint32_t>(in, 20);
    const std::size_t extra_length = entry.extra_data_bytes;

    const std::size_t total = BitmapEntry::encoded_size(name_length, extra_length);
    if (total > in.size()) return too_short(total, in.size());
    if (type != dirty_tracking)
        return fail(Errc::unsupported, "", fmt::format("type {} is not dirty tracking (1)", type));
    if (entry.granularity_bits > 63) {
        return fail(Errc::corrupt, "", fmt::format("granularity_bits {} is more than 63", entry.granularity_bits));
    }
    constexpr auto known =
        BitmapEntry::in_use_flag | BitmapEntry::enabled_flag | BitmapEntry::extra_data_compatible_flag;
    if ((entry.flags & ~known) != 0)
        return fail(Errc::corrupt, "", fmt::format("reserved flags are set ({:#x})", entry.flags));
    entry.understood = extra_length == 0 || (entry.flags & BitmapEntry::extra_data_compatible_flag) != 0;
    entry.info.granularity = bit(entry.granularity_bits);
    entry.info.in_use = (entry.flags & BitmapEntry::in_use_flag) != 0;
    entry.info.enabled = (entry.flags & BitmapEntry::enabled_flag) != 0;
    entry.info.name = as_text(in.subspan(fixed + extra_length, name_length));
    entry.encoded_bytes = total;
    return entry;
}

}  // namespace qcow::format
