#include "format/tables.h"

#include <gtest/gtest.h>

#include "support/bytes.h"
#include "support/result.h"

namespace qcow::format {
namespace {

using namespace qcow::test;

constexpr std::uint64_t disk_size = 1 << 30;

// ---- Snapshots ----

/// An entry "7", "before the upgrade" with this extra data, not padded: 40 bytes, the extra data, 1 and 18 bytes.
Bytes snapshot(const Bytes& extra) {
    return joined({
        u64(0x80000),        // l1_table_offset
        u32(16),             // l1_size
        u16(1),              // length of the id
        u16(18),             // length of the name
        u32(1700000000),     // seconds
        u32(123456789),      // nanoseconds
        u64(5'000'000'000),  // guest clock
        u32(4096),           // VM state size
        u32(static_cast<std::uint32_t>(extra.size())),
        extra,
        text_bytes("7"),
        text_bytes("before the upgrade"),
    });
}
constexpr std::size_t id_length_at = 12, name_length_at = 14, extra_length_at = 36;

const Bytes full_extra = joined({u64(std::uint64_t{5} << 32), u64(2 << 20), u64(42)});

TEST(Snapshot, IsReadWithAllItsFields) {
    const auto entry = must(parse_snapshot(snapshot(full_extra), 3, disk_size));
    EXPECT_EQ(entry.l1_table, HostOffset{0x80000});
    EXPECT_EQ(entry.l1_entries, 16U);
    EXPECT_EQ(entry.info.id, "7");
    EXPECT_EQ(entry.info.name, "before the upgrade");
    EXPECT_EQ(entry.info.date_seconds, 1700000000U);
    EXPECT_EQ(entry.info.date_nanoseconds, 123456789U);
    EXPECT_EQ(entry.info.vm_clock_nanoseconds, 5'000'000'000U);
    EXPECT_EQ(entry.info.vm_state_bytes, std::uint64_t{5} << 32);  // the 64-bit one
    EXPECT_EQ(entry.info.virtual_size, 2U << 20);
    EXPECT_EQ(entry.info.icount, 42U);
}

TEST(Snapshot, Version2MayHaveNoExtraData) {
    const auto entry = must(parse_snapshot(snapshot({}), 2, disk_size));
    EXPECT_EQ(entry.info.vm_state_bytes, 4096U);
    EXPECT_EQ(entry.info.virtual_size, disk_size);
    EXPECT_EQ(entry.info.icount, std::nullopt);
    EXPECT_EQ(entry.info.name, "before the upgrade");
}

TEST(Snapshot, ExtraDataCountAsFarAsTheyGo) {
    const auto eight = must(parse_snapshot(snapshot(u64(77)), 2, disk_size));
    EXPECT_EQ(eight.info.vm_state_bytes, 77U);
    EXPECT_EQ(eight.info.virtual_size, disk_size);
    const auto sixteen = must(parse_snapshot(snapshot(joined({u64(77), u64(512)})), 3, disk_size));
    EXPECT_EQ(sixteen.info.vm_state_bytes, 77U);
    EXPECT_EQ(sixteen.info.virtual_size, 512U);
    EXPECT_EQ(sixteen.info.icount, std::nullopt);
    EXPECT_EQ(sixteen.info.name, "before the upgrade");
}

TEST(Snapshot, HalfAFieldOfExtraDataDoesNotCount) {
    const auto seven = must(parse_snapshot(snapshot(repeated(7, 0xff)), 2, disk_size));
    EXPECT_EQ(seven.info.vm_state_bytes, 4096U);
    const auto fifteen = must(parse_snapshot(snapshot(repeated(15, 0xff)), 2, disk_size));
    EXPECT_EQ(fifteen.info.virtual_size, disk_size);
}

TEST(Snapshot, Version3NeedsTheFirst16BytesOfExtraData) {
    EXPECT_TRUE(parse_snapshot(snapshot(repeated(16, 0)), 3, disk_size));
    EXPECT_TRUE(fails(parse_snapshot(snapshot(repeated(15, 0)), 3, disk_size), Errc::corrupt,
                      {"15 bytes of extra data", "at least 16"}));
}

TEST(Snapshot, AnInstructionCountOfAllOnesIsNone) {
    const auto extra = joined({u64(0), u64(512), u64(~std::uint64_t{0})});
    EXPECT_EQ(must(parse_snapshot(snapshot(extra), 3, disk_size)).info.icount, std::nullopt);
    const auto zero = joined({u64(0), u64(512), u64(0)});
    EXPECT_EQ(must(parse_snapshot(snapshot(zero), 3, disk_size)).info.icount, 0U);
}

TEST(Snapshot, ExtraDataThatAreUnknownAreSkipped) {
    const auto extra = joined({full_extra, repeated(5, 0xee)});
    const auto entry = must(parse_snapshot(snapshot(extra), 3, disk_size));
    EXPECT_EQ(entry.info.icount, 42U);
    EXPECT_EQ(entry.info.id, "7");
}

TEST(Snapshot, TheNextEntryBeginsAtAMultipleOf8) {
    // 40 + 24 + 1 + 18 = 83 bytes
    const auto in = snapshot(full_extra);
    ASSERT_EQ(in.size(), 83U);
    EXPECT_EQ(must(parse_snapshot(joined({in, repeated(100, 0)}), 3, disk_size)).encoded_bytes, 88U);
    // 40 + 16 + 1 + 7 = 64 bytes need no padding.
    const auto even = with_u16(snapshot(repeated(16, 0)), name_length_at, 7);
    EXPECT_EQ(must(parse_snapshot(even, 3, disk_size)).encoded_bytes, 64U);
}

TEST(Snapshot, TheLastEntryNeedsNoPadding) {
    EXPECT_EQ(must(parse_snapshot(snapshot(full_extra), 3, disk_size)).encoded_bytes, 83U);
}

TEST(Snapshot, IdAndNameMayBeEmpty) {
    const auto in = with_u32(with_u16(with_u16(snapshot({}), id_length_at, 0), name_length_at, 0), extra_length_at, 0);
    const auto entry = must(parse_snapshot(first(in, 40), 2, disk_size));
    EXPECT_EQ(entry.info.id, "");
    EXPECT_EQ(entry.info.name, "");
    EXPECT_EQ(entry.encoded_bytes, 40U);
}

TEST(Snapshot, FitsInTheTable) {
    const auto in = snapshot(full_extra);
    EXPECT_TRUE(fails(parse_snapshot({}, 3, disk_size), Errc::corrupt, {"40 bytes", "the 0 bytes that are left"}));
    EXPECT_TRUE(fails(parse_snapshot(first(in, 39), 3, disk_size), Errc::corrupt, {"40 bytes", "the 39 bytes"}));
    EXPECT_TRUE(fails(parse_snapshot(first(in, 82), 3, disk_size), Errc::corrupt, {"83 bytes", "the 82 bytes"}));
}

TEST(Snapshot, LengthsBeyondTheTableAreRefused) {
    const auto in = snapshot(full_extra);
    EXPECT_TRUE(fails(parse_snapshot(with_u32(in, extra_length_at, 0xffffffff), 3, disk_size), Errc::corrupt));
    EXPECT_TRUE(fails(parse_snapshot(with_u16(in, id_length_at, 0xffff), 3, disk_size), Errc::corrupt));
    EXPECT_TRUE(fails(parse_snapshot(with_u16(in, name_length_at, 0xffff), 3, disk_size), Errc::corrupt));
}

TEST(Snapshot, L1SizeIsOnlyRead) {
    // Whether there is such a table is for those to check who know the file.
    EXPECT_EQ(must(parse_snapshot(with_u32(snapshot({}), 8, 0xffffffff), 2, disk_size)).l1_entries, 0xffffffffU);
}

// ---- Bitmaps ----

/// An entry "nightly": 24 bytes, `extra`, 7 bytes, padding.
Bytes bitmap(const Bytes& extra = {}) {
    auto entry = joined({
        u64(0x90000),  // table offset
        u32(2),        // table entries
        u32(0b010),    // flags: auto
        u8(1),         // dirty tracking
        u8(16),        // granularity_bits
        u16(7),        // length of the name
        u32(static_cast<std::uint32_t>(extra.size())),
        extra,
        text_bytes("nightly"),
    });
    entry.resize((entry.size() + 7) / 8 * 8);
    return entry;
}
constexpr std::size_t flags_at = 12, type_at = 16, granularity_at = 17, bitmap_name_length_at = 18,
                      bitmap_extra_length_at = 20;

TEST(Bitmap, IsReadWithAllItsFields) {
    const auto entry = must(parse_bitmap(bitmap()));
    EXPECT_EQ(entry.table, HostOffset{0x90000});
    EXPECT_EQ(entry.table_entries, 2U);
    EXPECT_EQ(entry.granularity_bits, 16U);
    EXPECT_EQ(entry.info.granularity, 65536U);
    EXPECT_EQ(entry.info.name, "nightly");
    EXPECT_TRUE(entry.info.enabled);
    EXPECT_FALSE(entry.info.in_use);
}

TEST(Bitmap, FlagsAreInUseAutoAndExtraDataCompatible) {
    EXPECT_FALSE(must(parse_bitmap(with_u32(bitmap(), flags_at, 0))).info.enabled);
    const auto in_use = must(parse_bitmap(with_u32(bitmap(), flags_at, 0b001)));
    EXPECT_TRUE(in_use.info.in_use);
    EXPECT_FALSE(in_use.info.enabled);
    EXPECT_EQ(must(parse_bitmap(with_u32(bitmap(), flags_at, 0b111))).flags, 0b111U);
}

TEST(Bitmap, ExtraDataMustBeUnderstoodUnlessTheFlagsSayOtherwise) {
    EXPECT_TRUE(must(parse_bitmap(bitmap())).understood);
    const auto extra = bitmap(repeated(9, 0xee));
    EXPECT_FALSE(must(parse_bitmap(with_u32(extra, flags_at, 0b010))).understood);
    EXPECT_TRUE(must(parse_bitmap(with_u32(extra, flags_at, 0b110))).understood);
}

TEST(Bitmap, OtherFlagsAreReserved) {
    EXPECT_TRUE(fails(parse_bitmap(with_u32(bitmap(), flags_at, 0b1000)), Errc::corrupt, {"reserved flags", "0x8"}));
    EXPECT_TRUE(fails(parse_bitmap(with_u32(bitmap(), flags_at, 0x80000000)), Errc::corrupt, {"reserved flags"}));
}

TEST(Bitmap, TypeIsDirtyTracking) {
    EXPECT_TRUE(fails(parse_bitmap(with_u8(bitmap(), type_at, 0)), Errc::unsupported, {"type 0"}));
    EXPECT_TRUE(fails(parse_bitmap(with_u8(bitmap(), type_at, 2)), Errc::unsupported, {"type 2"}));
}

TEST(Bitmap, GranularityIsBelow64Bits) {
    EXPECT_EQ(must(parse_bitmap(with_u8(bitmap(), granularity_at, 9))).info.granularity, 512U);
    EXPECT_EQ(must(parse_bitmap(with_u8(bitmap(), granularity_at, 31))).info.granularity, std::uint64_t{1} << 31);
    EXPECT_EQ(must(parse_bitmap(with_u8(bitmap(), granularity_at, 63))).info.granularity, std::uint64_t{1} << 63);
    EXPECT_TRUE(fails(parse_bitmap(with_u8(bitmap(), granularity_at, 64)), Errc::corrupt, {"granularity_bits 64"}));
    EXPECT_TRUE(fails(parse_bitmap(with_u8(bitmap(), granularity_at, 255)), Errc::corrupt, {"granularity_bits 255"}));
}

TEST(Bitmap, ExtraDataAreSkipped) {
    const auto entry = must(parse_bitmap(bitmap(repeated(9, 0xee))));
    EXPECT_EQ(entry.info.name, "nightly");
}

TEST(Bitmap, TheNextEntryBeginsAtAMultipleOf8) {
    // 24 + 7 = 31 bytes
    EXPECT_EQ(must(parse_bitmap(joined({bitmap(), repeated(100, 0)}))).encoded_bytes, 32U);
    EXPECT_EQ(must(parse_bitmap(joined({bitmap(repeated(1, 0)), repeated(100, 0)}))).encoded_bytes, 32U);
    EXPECT_EQ(must(parse_bitmap(joined({bitmap(repeated(2, 0)), repeated(100, 0)}))).encoded_bytes, 40U);
}

TEST(Bitmap, FitsInTheDirectory) {
    EXPECT_TRUE(parse_bitmap(bitmap()));
    EXPECT_TRUE(fails(parse_bitmap(first(bitmap(), 23)), Errc::corrupt, {"24 bytes", "the 23 bytes"}));
    EXPECT_TRUE(fails(parse_bitmap(first(bitmap(), 31)), Errc::corrupt, {"32 bytes", "the 31 bytes"}));
    EXPECT_TRUE(fails(parse_bitmap(with_u16(bitmap(), bitmap_name_length_at, 0xffff)), Errc::corrupt));
    EXPECT_TRUE(fails(parse_bitmap(with_u32(bitmap(), bitmap_extra_length_at, 0xffffffff)), Errc::corrupt));
}

TEST(BitmapTableEntry, Bits9To55AreTheClustersOffset) {
    EXPECT_EQ(BitmapTableEntry{0x50000}.cluster(), HostOffset{0x50000});
    EXPECT_EQ(BitmapTableEntry{~std::uint64_t{0}}.cluster(), HostOffset{0x00ff'ffff'ffff'fe00});
    EXPECT_EQ(BitmapTableEntry{1}.cluster(), HostOffset{0});
}

TEST(BitmapTableEntry, Bit0CountsOnlyWithoutACluster) {
    EXPECT_FALSE(BitmapTableEntry{0}.reserved_bits_set());        // all zeros
    EXPECT_FALSE(BitmapTableEntry{1}.reserved_bits_set());        // all ones
    EXPECT_FALSE(BitmapTableEntry{0x50000}.reserved_bits_set());  // bits in a cluster
    EXPECT_TRUE(BitmapTableEntry{0x50001}.reserved_bits_set());
}

TEST(BitmapTableEntry, IsAllOnesOnlyWithoutACluster) {
    EXPECT_TRUE(BitmapTableEntry{1}.all_ones());
    EXPECT_FALSE(BitmapTableEntry{0}.all_ones());
    EXPECT_FALSE(BitmapTableEntry{0x50001}.all_ones());
}

TEST(BitmapTableEntry, OtherBitsAreReserved) {
    EXPECT_TRUE(BitmapTableEntry{0x50000 | 1 << 8}.reserved_bits_set());
    EXPECT_TRUE(BitmapTableEntry{2}.reserved_bits_set());
    EXPECT_TRUE(BitmapTableEntry{std::uint64_t{1} << 56}.reserved_bits_set());
    EXPECT_TRUE((BitmapTableEntry{0x50000 | std::uint64_t{1} << 63}.reserved_bits_set()));
}

}  // namespace
}  // namespace qcow::format
