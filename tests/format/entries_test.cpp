#include "format/entries.h"

#include <gtest/gtest.h>

#include <string>

namespace qcow::format {
namespace {

constexpr std::uint64_t all_ones = ~std::uint64_t{0};

EntryRules standard(unsigned version = 3) {
    EntryRules rules;
    rules.version = version;
    return rules;
}

EntryRules extended() {
    EntryRules rules;
    rules.geometry.extended_l2 = true;
    return rules;
}

EntryRules with_external_data(EntryRules rules) {
    rules.external_data = true;
    return rules;
}

std::string flaw_of(const EntryRules& rules, L2Entry entry, GuestOffset cluster = {}) {
    const auto flaw = rules.flaw(entry, cluster);
    return flaw ? std::string(flaw->what) : "none";
}
bool is_unreadable(const EntryRules& rules, L2Entry entry, GuestOffset cluster = {}) {
    const auto flaw = rules.flaw(entry, cluster);
    return flaw && flaw->unreadable;
}

/// The bitmap of an extended entry.
constexpr std::uint64_t subclusters(std::uint32_t allocated, std::uint32_t zero) {
    return std::uint64_t{zero} << 32 | allocated;
}

// ---- Compressed ----

TEST(CompressedWord, SaysWhereAndHowLongUpToItsLimit) {
    for (unsigned bits = 9; bits <= 21; ++bits) {
        const std::uint64_t limit = std::uint64_t{1} << compressed_offset_bits(bits);
        const std::uint64_t length = (std::uint64_t{1} << bits) - 1;
        for (const auto offset : {std::uint64_t{0}, std::uint64_t{0x12345}, limit - 1}) {
            const auto range = L2Entry{compressed_word({{offset}, length}, bits)}.compressed_range(bits);
            EXPECT_EQ(range.offset, HostOffset{offset}) << bits;
            EXPECT_GE(range.length, length) << bits;
            EXPECT_LT(range.length, length + 512) << bits;
        }
    }
}

// ---- L1 entries ----

TEST(L1Entry, AllZerosIsAnUnallocatedTable) {
    const L1Entry entry{0};
    EXPECT_FALSE(entry.allocated());
    EXPECT_FALSE(entry.copied());
    EXPECT_FALSE(entry.reserved_bits_set());
}

TEST(L1Entry, Bits9To55AreTheTablesOffset) {
    const L1Entry entry{0x8000'0000'0005'0000};
    EXPECT_TRUE(entry.allocated());
    EXPECT_EQ(entry.l2_table(), HostOffset{0x50000});
    EXPECT_TRUE(entry.copied());
    EXPECT_FALSE(entry.reserved_bits_set());
    EXPECT_EQ(L1Entry{all_ones}.l2_table(), HostOffset{0x00ff'ffff'ffff'fe00});
    EXPECT_FALSE(L1Entry{0x50000}.copied());
}

TEST(L1Entry, Bits0To8And56To62AreReserved) {
    EXPECT_TRUE(L1Entry{bit(0)}.reserved_bits_set());
    EXPECT_TRUE(L1Entry{bit(8)}.reserved_bits_set());
    EXPECT_FALSE(L1Entry{bit(9)}.reserved_bits_set());
    EXPECT_FALSE(L1Entry{bit(55)}.reserved_bits_set());
    EXPECT_TRUE(L1Entry{bit(56)}.reserved_bits_set());
    EXPECT_TRUE(L1Entry{bit(62)}.reserved_bits_set());
    EXPECT_FALSE(L1Entry{bit(63)}.reserved_bits_set());
}

TEST(L1Entry, ReservedBitsDoNotAllocate) { EXPECT_FALSE((L1Entry{bit(0) | bit(8) | bit(56) | bit(63)}.allocated())); }

// ---- L2 entries: compressed ----

TEST(CompressedEntry, LengthReachesToTheEndOfTheFirstSector) {
    const L2Entry entry{compressed_bit | 0x100210};
    EXPECT_TRUE(entry.compressed());
    EXPECT_EQ(entry.compressed_range(16), (CompressedRange{{0x100210}, 0x1f0}));
}

TEST(CompressedEntry, FurtherSectorsAddToTheLength) {
    const L2Entry entry{compressed_bit | bit(54) | 0x100200};
    EXPECT_EQ(entry.compressed_range(16), (CompressedRange{{0x100200}, 0x400}));
}

TEST(CompressedEntry, AllSectorBitsSetIsTwiceACluster) {
    // 8 bits: 255 further sectors.
    EXPECT_EQ(L2Entry{compressed_bit | 0x3fc0'0000'0000'0000}.compressed_range(16), (CompressedRange{{0}, 131072}));
}

TEST(CompressedEntry, SmallClustersHaveOneSectorBitAndLargeOnesThirteen) {
    EXPECT_EQ(L2Entry{compressed_bit | bit(61) | 0x1ff}.compressed_range(9), (CompressedRange{{0x1ff}, 513}));
    EXPECT_EQ(L2Entry{compressed_bit | bit(60)}.compressed_range(9), (CompressedRange{{bit(60)}, 512}));
    EXPECT_EQ(L2Entry{compressed_bit | bit(49) | 1}.compressed_range(21), (CompressedRange{{1}, 1023}));
    EXPECT_EQ(L2Entry{compressed_bit | bit(48)}.compressed_range(21), (CompressedRange{{bit(48)}, 512}));
}

TEST(CompressedEntry, AllOnesIsARangeLikeAnother) {
    const auto range = L2Entry{all_ones}.compressed_range(16);
    EXPECT_EQ(range.offset, HostOffset{bit(54) - 1});
    EXPECT_EQ(range.length, 256U * 512 - 511);
}

TEST(CompressedEntry, HasNoOtherFlawsThanCopied) {
    EXPECT_EQ(flaw_of(standard(), {compressed_bit | 0x100211}), "none");
    EXPECT_EQ(flaw_of(standard(2), {compressed_bit | 0x100211}), "none");
    const L2Entry copied{compressed_bit | copied_bit | 0x100210};
    EXPECT_EQ(flaw_of(standard(), copied), "compressed and COPIED at once");
    EXPECT_FALSE(is_unreadable(standard(), copied));
}

TEST(CompressedEntry, IsUnreadableWithAnExternalDataFile) {
    const L2Entry entry{compressed_bit | 0x100210};
    EXPECT_EQ(flaw_of(with_external_data(standard()), entry), "compressed, which an external data file excludes");
    EXPECT_TRUE(is_unreadable(with_external_data(standard()), entry));
}

TEST(CompressedEntry, HasNoSubclusters) {
    EXPECT_EQ(flaw_of(extended(), {compressed_bit | 0x100210, 0}), "none");
    const L2Entry entry{compressed_bit | 0x100210, 1};
    EXPECT_EQ(flaw_of(extended(), entry), "compressed with a subcluster bitmap that is not zero");
    EXPECT_FALSE(is_unreadable(extended(), entry));
}

TEST(CompressedEntry, RunsToTheEndOfTheCluster) {
    EXPECT_EQ(standard().run({compressed_bit | 0x100210}, 0).kind, ClusterKind::compressed);
    EXPECT_EQ(standard().run({compressed_bit | 0x100210}, 0).count, 1U);
    EXPECT_EQ(extended().run({compressed_bit | 0x100210}, 5).kind, ClusterKind::compressed);
    EXPECT_EQ(extended().run({compressed_bit | 0x100210}, 5).count, 27U);
}

// ---- L2 entries: standard ----

TEST(StandardEntry, AllZerosIsUnallocated) {
    EXPECT_EQ(standard().run({0}, 0).kind, ClusterKind::unallocated);
    EXPECT_EQ(standard().run({0}, 0).count, 1U);
    EXPECT_EQ(flaw_of(standard(), {0}), "none");
}

TEST(StandardEntry, AnOffsetIsData) {
    const L2Entry entry{copied_bit | 0x50000};
    EXPECT_EQ(standard().run(entry, 0).kind, ClusterKind::data);
    EXPECT_EQ(entry.cluster(), HostOffset{0x50000});
    EXPECT_TRUE(entry.copied());
    EXPECT_FALSE(entry.compressed());
    EXPECT_EQ(flaw_of(standard(), entry), "none");
    EXPECT_EQ(flaw_of(standard(), {0x50000}), "none");
}

TEST(StandardEntry, OffsetHasBits9To55) {
    EXPECT_EQ((L2Entry{all_ones & ~compressed_bit}.cluster()), HostOffset{0x00ff'ffff'ffff'fe00});
}

TEST(StandardEntry, Bit0ReadsAsZeros) {
    EXPECT_EQ(standard().run({zero_bit}, 0).kind, ClusterKind::zero);
    EXPECT_EQ(flaw_of(standard(), {zero_bit}), "none");
    EXPECT_EQ(standard().run({copied_bit | 0x50000 | zero_bit}, 0).kind, ClusterKind::zero_allocated);
    EXPECT_EQ(flaw_of(standard(), {copied_bit | 0x50000 | zero_bit}), "none");
}

TEST(StandardEntry, Version2DoesNotHaveBit0) {
    EXPECT_EQ(flaw_of(standard(2), {0x50000 | zero_bit}), "marked as zeros, which version 2 does not have");
    EXPECT_TRUE(is_unreadable(standard(2), {0x50000 | zero_bit}));
    EXPECT_EQ(standard(2).run({0x50000 | zero_bit}, 0).kind, ClusterKind::data);
}

TEST(StandardEntry, OffsetIsAMultipleOfTheClusterSize) {
    EXPECT_EQ(flaw_of(standard(), {0x50200}), "its host offset is not a multiple of the cluster size");
    EXPECT_TRUE(is_unreadable(standard(), {0x50200}));
    auto small = standard();
    small.geometry.cluster_bits = 9;
    EXPECT_EQ(flaw_of(small, {0x50200}), "none");
}

TEST(StandardEntry, ReservedBitsAreAFlawButReadable) {
    EXPECT_EQ(flaw_of(standard(), {0x50000 | bit(1)}), "reserved bits are set");
    EXPECT_EQ(flaw_of(standard(), {0x50000 | bit(8)}), "reserved bits are set");
    EXPECT_EQ(flaw_of(standard(), {0x50000 | bit(56)}), "reserved bits are set");
    EXPECT_EQ(flaw_of(standard(), {0x50000 | bit(61)}), "reserved bits are set");
    EXPECT_FALSE(is_unreadable(standard(), {0x50000 | bit(61)}));
    EXPECT_EQ(standard().run({0x50000 | bit(61)}, 0).kind, ClusterKind::data);
    EXPECT_EQ(standard().run({bit(61)}, 0).kind, ClusterKind::unallocated);
}

TEST(StandardEntry, CopiedWithoutAHostClusterIsAFlaw) {
    EXPECT_EQ(flaw_of(standard(), {copied_bit}), "COPIED, but there is no host cluster");
    EXPECT_FALSE(is_unreadable(standard(), {copied_bit}));
    EXPECT_EQ(standard().run({copied_bit}, 0).kind, ClusterKind::unallocated);
    EXPECT_EQ(flaw_of(standard(), {copied_bit | zero_bit}), "COPIED, but there is no host cluster");
}

TEST(StandardEntry, CopiedAtOffset0IsTheFirstClusterOfAnExternalDataFile) {
    const auto rules = with_external_data(standard());
    EXPECT_EQ(rules.run({copied_bit}, 0).kind, ClusterKind::data);
    EXPECT_EQ(rules.run({copied_bit | zero_bit}, 0).kind, ClusterKind::zero_allocated);
    EXPECT_EQ(flaw_of(rules, {copied_bit}), "none");
    EXPECT_EQ(rules.run({0}, 0).kind, ClusterKind::unallocated);
    EXPECT_EQ(rules.run({zero_bit}, 0).kind, ClusterKind::zero);
}

TEST(StandardEntry, InAnExternalDataFileAGuestClusterHasItsPlace) {
    const auto rules = with_external_data(standard());
    EXPECT_EQ(flaw_of(rules, {copied_bit | 0x30000}, {0x30000}), "none");
    EXPECT_EQ(flaw_of(rules, {zero_bit}, {0x30000}), "none");
    EXPECT_EQ(flaw_of(rules, {0}, {0x30000}), "none");
    for (const std::uint64_t elsewhere : {copied_bit, copied_bit | 0x40000, copied_bit | zero_bit | 0x40000}) {
        EXPECT_EQ(flaw_of(rules, {elsewhere}, {0x30000}),
                  "it does not lie where the guest's cluster lies in the data file");
        EXPECT_TRUE(is_unreadable(rules, {elsewhere}, {0x30000}));
    }
    EXPECT_EQ(flaw_of(standard(), {copied_bit | 0x40000}, {0x30000}), "none");
}

// ---- L2 entries: extended ----

TEST(ExtendedEntry, AllZerosIsUnallocatedThroughout) {
    const auto run = extended().run({0, 0}, 0);
    EXPECT_EQ(run.kind, ClusterKind::unallocated);
    EXPECT_EQ(run.count, 32U);
    EXPECT_EQ(extended().run({0, 0}, 5).count, 27U);
    EXPECT_EQ(flaw_of(extended(), {0, 0}), "none");
}

TEST(ExtendedEntry, AllAllocatedIsDataThroughout) {
    const L2Entry entry{copied_bit | 0x50000, subclusters(0xffffffff, 0)};
    EXPECT_EQ(extended().run(entry, 0).kind, ClusterKind::data);
    EXPECT_EQ(extended().run(entry, 0).count, 32U);
    EXPECT_EQ(extended().run(entry, 31).count, 1U);
    EXPECT_EQ(flaw_of(extended(), entry), "none");
}

TEST(ExtendedEntry, RunsAreTheSubclustersThatAreAlike) {
    // 0-3 data, 4-6 unallocated, 7 zero, 8-30 unallocated, 31 zero
    const L2Entry entry{0x50000, subclusters(0x0000000f, 0x80000080)};
    const auto rules = extended();
    EXPECT_EQ(flaw_of(rules, entry), "none");
    EXPECT_EQ(rules.run(entry, 0).kind, ClusterKind::data);
    EXPECT_EQ(rules.run(entry, 0).count, 4U);
    EXPECT_EQ(rules.run(entry, 3).kind, ClusterKind::data);
    EXPECT_EQ(rules.run(entry, 3).count, 1U);
    EXPECT_EQ(rules.run(entry, 4).kind, ClusterKind::unallocated);
    EXPECT_EQ(rules.run(entry, 4).count, 3U);
    EXPECT_EQ(rules.run(entry, 7).kind, ClusterKind::zero_allocated);
    EXPECT_EQ(rules.run(entry, 7).count, 1U);
    EXPECT_EQ(rules.run(entry, 8).kind, ClusterKind::unallocated);
    EXPECT_EQ(rules.run(entry, 8).count, 23U);
    EXPECT_EQ(rules.run(entry, 31).kind, ClusterKind::zero_allocated);
    EXPECT_EQ(rules.run(entry, 31).count, 1U);
}

TEST(ExtendedEntry, ADataRunEndsWhereZerosBegin) {
    const L2Entry entry{0x50000, subclusters(0x0000ffff, 0xffff0000)};
    EXPECT_EQ(extended().run(entry, 2).kind, ClusterKind::data);
    EXPECT_EQ(extended().run(entry, 2).count, 14U);
    EXPECT_EQ(extended().run(entry, 16).kind, ClusterKind::zero_allocated);
    EXPECT_EQ(extended().run(entry, 16).count, 16U);
}

TEST(ExtendedEntry, ZeroSubclustersNeedNoHostCluster) {
    const L2Entry entry{0, subclusters(0, 0xffffffff)};
    EXPECT_EQ(extended().run(entry, 0).kind, ClusterKind::zero);
    EXPECT_EQ(extended().run(entry, 0).count, 32U);
    EXPECT_EQ(flaw_of(extended(), entry), "none");
}

TEST(ExtendedEntry, AHostClusterMayHaveNoAllocatedSubcluster) {
    const L2Entry entry{copied_bit | 0x50000, 0};
    EXPECT_EQ(extended().run(entry, 0).kind, ClusterKind::unallocated);
    EXPECT_EQ(flaw_of(extended(), entry), "none");
}

TEST(ExtendedEntry, Bit0IsReservedAndMeansNothing) {
    const L2Entry entry{0x50000 | zero_bit, subclusters(0xffffffff, 0)};
    EXPECT_EQ(extended().run(entry, 0).kind, ClusterKind::data);
    EXPECT_EQ(flaw_of(extended(), entry), "reserved bits are set");
    EXPECT_FALSE(is_unreadable(extended(), entry));
    EXPECT_EQ(extended().run({zero_bit, 0}, 0).kind, ClusterKind::unallocated);
}

TEST(ExtendedEntry, ASubclusterThatIsBothAllocatedAndZeroIsUnreadable) {
    const L2Entry entry{0x50000, subclusters(0x80000000, 0x80000000)};
    EXPECT_EQ(flaw_of(extended(), entry), "a subcluster is both allocated and zero");
    EXPECT_TRUE(is_unreadable(extended(), entry));
}

TEST(ExtendedEntry, AllocatedSubclustersNeedAHostCluster) {
    const L2Entry entry{0, subclusters(1, 0)};
    EXPECT_EQ(flaw_of(extended(), entry), "subclusters are allocated, but there is no host cluster");
    EXPECT_TRUE(is_unreadable(extended(), entry));
    EXPECT_EQ(flaw_of(with_external_data(extended()), {copied_bit, subclusters(1, 0)}), "none");
}

TEST(ExtendedEntry, OffsetIsAMultipleOfTheClusterSizeNotOfTheSubclusters) {
    const L2Entry entry{0x50800, subclusters(0xffffffff, 0)};
    EXPECT_EQ(flaw_of(extended(), entry), "its host offset is not a multiple of the cluster size");
}

}  // namespace
}  // namespace qcow::format
