#include "qcow2/mapping.h"

#include <gtest/gtest.h>

#include "base/try.h"
#include "storage/pass_through.h"
#include "support/qcow2_header.h"
#include "support/random.h"
#include "support/result.h"

namespace qcow::qcow2 {
namespace {

using format::ClusterKind;
using test::Bytes;
using test::fails;
using test::must;

constexpr std::uint64_t copied = std::uint64_t{1} << 63;
constexpr std::uint64_t compressed = std::uint64_t{1} << 62;
constexpr std::uint64_t zero = 1;
constexpr std::uint64_t extended_l2 = 1 << 4;
constexpr std::uint64_t external_data = 1 << 2;
constexpr std::uint64_t no_limit = ~std::uint64_t{0};

bool has_host(ClusterKind kind) { return kind == ClusterKind::data || kind == ClusterKind::zero_allocated; }

/// Fails each read that touches the sector at `bad`.
class BadSector final : public PassThrough {
public:
    BadSector(std::shared_ptr<Storage> inner, std::uint64_t bad) : PassThrough(std::move(inner)), bad_(bad) {}

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        if (at.value < bad_ + 512 && bad_ < at.value + to.size()) return fail(Errc::io, name(), "bad sector");
        return PassThrough::read(at, to);
    }

private:
    std::uint64_t bad_;
};

/// An image of 24 clusters, all of them counted, whose disk is what two L1 entries map. Clusters are 4 KiB, of which an
/// L2 table maps 2 MiB; or 16 KiB with extended entries, where it is 16 MiB.
class MappingTest : public testing::Test {
protected:
    enum Cluster : std::uint64_t {
        refcount_table = 1,
        refcount_block = 2,
        l1_table = 3,
        l2_table = 4,
        second_l2_table = 5,
        snapshot_l1 = 6,
        snapshot_l2 = 7,
        data = 8,
        image_end = 24
    };

    MappingTest() { format(12, 0); }

    void format(unsigned bits, std::uint64_t incompatible, std::uint32_t version = 3) {
        cluster_bits_ = bits;
        bytes_ = Bytes(at(image_end));
        const bool extended = (incompatible & extended_l2) != 0;
        coverage_ = bit(bits) * (bit(bits) / (extended ? 16 : 8));
        put_header(version == 2 ? test::header_v2() : test::header_v3());
        set_u32(test::field::cluster_bits, bits);
        set(test::field::size, 2 * coverage_);
        set_u32(test::field::l1_size, 2);
        set(test::field::l1_table_offset, at(l1_table));
        set(test::field::refcount_table_offset, at(refcount_table));
        if (version == 3) set(test::field::incompatible_features, incompatible);
        set(at(refcount_table), at(refcount_block));
        for (std::uint64_t cluster = 0; cluster < image_end; ++cluster)
            bytes_[at(refcount_block, cluster * 2 + 1)] = std::byte{1};
        set(at(l1_table), at(l2_table) | copied);
    }

    [[nodiscard]] std::uint64_t at(std::uint64_t cluster, std::uint64_t byte = 0) const {
        return (cluster << cluster_bits_) + byte;
    }
    void set(std::uint64_t offset, std::uint64_t word) { bytes_ = test::with_u64(std::move(bytes_), offset, word); }
    void set_u32(std::uint64_t offset, std::uint32_t word) { bytes_ = test::with_u32(std::move(bytes_), offset, word); }
    void l2(std::uint64_t index, std::uint64_t word) { set(at(l2_table, index * 8), word); }
    void l2(std::uint64_t index, std::uint64_t word, std::uint64_t bitmap) {
        set(at(l2_table, index * 16), word);
        set(at(l2_table, index * 16 + 8), bitmap);
    }

    /// The image as it is now, `bad` being a sector that cannot be read.
    const Metadata& open(std::optional<std::uint64_t> bad = {}) {
        auto file = memory_storage(bytes_, "image");
        if (bad) file = std::make_shared<BadSector>(file, *bad);
        const auto header = test::first(bytes_, at(1));
        metadata_ = std::make_unique<Metadata>(must(format::parse_header(header)), file, 1 << 20);
        return *metadata_;
    }

    Result<Mapped> lookup(std::uint64_t guest, std::uint64_t limit = no_limit) {
        if (!metadata_) open();
        return Mapping(*metadata_).lookup({guest}, limit);
    }
    /// As if the image had just been changed.
    Result<Mapped> lookup_anew(std::uint64_t guest, std::uint64_t limit = no_limit) {
        metadata_.reset();
        return lookup(guest, limit);
    }

    static void expect(const Result<Mapped>& mapped, ClusterKind kind, std::uint64_t length, std::uint64_t host = 0) {
        ASSERT_TRUE(mapped) << mapped.error().message();
        EXPECT_EQ(static_cast<int>(mapped->kind), static_cast<int>(kind));
        EXPECT_EQ(mapped->length, length);
        if (has_host(kind)) {
            EXPECT_EQ(mapped->host.value, host);
        }
    }
    static void expect_damage(const Result<Mapped>& mapped, std::uint64_t begin, std::uint64_t length,
                              std::initializer_list<std::string_view> parts, Errc code = Errc::corrupt) {
        EXPECT_TRUE(fails(mapped, code, parts));
        if (mapped) return;
        EXPECT_EQ(mapped.error().unreadable.start.value, begin);
        EXPECT_EQ(mapped.error().unreadable.length, length);
    }

    unsigned cluster_bits_ = 12;
    std::uint64_t coverage_ = 0;
    Bytes bytes_;
    std::unique_ptr<Metadata> metadata_;

private:
    void put_header(const Bytes& header) { std::copy_n(header.begin(), 512, bytes_.begin()); }
};

TEST_F(MappingTest, DecodesAnEntryFromAByteOnToItsClustersEnd) {
    const auto& rules = open().rules();
    const auto from = [&](std::uint64_t word) { return decode(rules, {word}, {3 * 4096 + 100}); };
    expect(from(0), ClusterKind::unallocated, 3996);
    expect(from(zero), ClusterKind::zero, 3996);
    expect(from(0x9000 | copied), ClusterKind::data, 3996, 0x9064);
    EXPECT_TRUE(from(0x9000 | copied).copied);
    expect(from(0x9000 | zero), ClusterKind::zero_allocated, 3996, 0x9064);
    EXPECT_FALSE(from(0x9000 | zero).copied);
    const auto stream = from(compressed | std::uint64_t{2} << 58 | 0x9123);
    expect(stream, ClusterKind::compressed, 3996);
    EXPECT_EQ(stream.compressed.offset, HostOffset{0x9123});
    EXPECT_EQ(stream.compressed.length, 3 * 512 - 0x123);
    expect(decode(rules, {0x9000}, {4095}), ClusterKind::data, 1, 0x9fff);
}

TEST_F(MappingTest, DecodesSubclusters) {
    format(14, extended_l2);
    const auto& rules = open().rules();
    // 0 to 3 are allocated, 8 and 31 are zeros.
    const format::L2Entry entry{0x20000, std::uint64_t{0x8000'0100} << 32 | 0xf};
    expect(decode(rules, entry, {0}), ClusterKind::data, 4 * 512, 0x20000);
    expect(decode(rules, entry, {512 + 5}), ClusterKind::data, 3 * 512 - 5, 0x20205);
    expect(decode(rules, entry, {4 * 512}), ClusterKind::unallocated, 4 * 512);
    expect(decode(rules, entry, {8 * 512}), ClusterKind::zero_allocated, 512, 0x21000);
    expect(decode(rules, entry, {31 * 512 + 511}), ClusterKind::zero_allocated, 1, 0x23fff);
    expect(decode(rules, {compressed | 0x20000}, {512}), ClusterKind::compressed, 31 * 512);
}

TEST_F(MappingTest, ARunOfDataEndsWhereItIsNotContiguous) {
    l2(0, at(data) | copied);
    l2(1, at(data + 1) | copied);
    l2(2, at(data + 2) | copied);
    l2(3, at(data + 4) | copied);
    expect(lookup(0), ClusterKind::data, 3 * 4096, at(data));
    expect(lookup(4096 + 1), ClusterKind::data, 2 * 4096 - 1, at(data + 1, 1));
    expect(lookup(3 * 4096), ClusterKind::data, 4096, at(data + 4));
}

TEST_F(MappingTest, ARunEndsWhereCopiedChanges) {
    l2(0, at(data) | copied);
    l2(1, at(data + 1));
    l2(2, at(data + 2));
    expect(lookup(0), ClusterKind::data, 4096, at(data));
    EXPECT_TRUE(lookup(0)->copied);
    expect(lookup(4096), ClusterKind::data, 2 * 4096, at(data + 1));
    EXPECT_FALSE(lookup(4096)->copied);
}

TEST_F(MappingTest, TheLimitCutsARun) {
    l2(0, at(data) | copied);
    l2(1, at(data + 1) | copied);
    expect(lookup(0, 1), ClusterKind::data, 1, at(data));
    expect(lookup(100, 4096), ClusterKind::data, 4096, at(data, 100));
    expect(lookup(0, 8192), ClusterKind::data, 8192, at(data));
    expect(lookup(8192, 5), ClusterKind::unallocated, 5);
    expect(lookup(coverage_, 7), ClusterKind::unallocated, 7);
}

TEST_F(MappingTest, ZerosAreRunsOfTheirOwn) {
    for (const std::uint64_t index : {0, 1, 2}) l2(index, zero);
    for (const std::uint64_t index : {3, 4}) l2(index, at(data + index) | zero | copied);
    l2(5, at(data + 5) | copied);
    expect(lookup(0), ClusterKind::zero, 3 * 4096);
    expect(lookup(3 * 4096), ClusterKind::zero_allocated, 2 * 4096, at(data + 3));
    expect(lookup(5 * 4096), ClusterKind::data, 4096, at(data + 5));
    expect(lookup(6 * 4096), ClusterKind::unallocated, coverage_ - 6 * 4096);
}

TEST_F(MappingTest, CompressedClustersAreOneRun) {
    l2(0, compressed | std::uint64_t{1} << 58 | at(data, 77));
    l2(1, compressed | at(data, 1500));
    l2(2, at(data + 1));
    const auto mapped = lookup(0);
    expect(mapped, ClusterKind::compressed, 2 * 4096);
    EXPECT_EQ(mapped->compressed, (format::CompressedRange{{at(data, 77)}, 2 * 512 - 77}));
    expect(lookup(10, 4096), ClusterKind::compressed, 4096);
    const auto second = lookup(4096);
    EXPECT_EQ(second->compressed, (format::CompressedRange{{at(data, 1500)}, 3 * 512 - 1500}));
}

TEST_F(MappingTest, ARunEndsWithItsL2Table) {
    set(at(l1_table, 8), at(second_l2_table) | copied);
    l2(511, zero);
    set(at(second_l2_table), zero);
    expect(lookup(coverage_ - 4096), ClusterKind::zero, 4096);
    expect(lookup(coverage_), ClusterKind::zero, 4096);
    expect(lookup(0), ClusterKind::unallocated, coverage_ - 4096);
}

TEST_F(MappingTest, WithoutATableTheRunEndsWithItsL1Entry) {
    set(at(l1_table), 0);
    expect(lookup(0), ClusterKind::unallocated, coverage_);
    expect(lookup(5000), ClusterKind::unallocated, coverage_ - 5000);
    expect(lookup(coverage_ + 1), ClusterKind::unallocated, coverage_ - 1);
}

/// Of a table that is larger than a page of the cache, one page at a time. Nothing may be missed between them.
TEST_F(MappingTest, ATableOfSeveralPagesIsLookedUpInPieces) {
    format(16, 0);
    for (std::uint64_t index = 0; index < 8192; ++index) l2(index, index < 8000 ? zero : 0);
    std::uint64_t guest = 0;
    while (guest < 8000 * at(1)) {
        const auto mapped = must(lookup(guest));
        ASSERT_EQ(mapped.kind, ClusterKind::zero);
        ASSERT_GT(mapped.length, 0U);
        guest += mapped.length;
    }
    EXPECT_EQ(guest, 8000 * at(1));
    expect(lookup(guest), ClusterKind::unallocated, coverage_ - guest);
}

TEST_F(MappingTest, ASnapshotHasATableOfItsOwn) {
    set(at(snapshot_l1), at(snapshot_l2));
    set(at(snapshot_l2), at(data + 1));
    l2(0, at(data) | copied);
    const auto& metadata = open();
    const Mapping active(metadata);
    const Mapping snapshot(metadata, HostOffset{at(snapshot_l1)});
    expect(active.lookup({0}, no_limit), ClusterKind::data, 4096, at(data));
    expect(snapshot.lookup({0}, no_limit), ClusterKind::data, 4096, at(data + 1));
    EXPECT_EQ(active.l1_entry_at({coverage_}), HostOffset{at(l1_table, 8)});
    EXPECT_EQ(snapshot.l1_entry_at({coverage_ - 1}), HostOffset{at(snapshot_l1)});
    EXPECT_EQ(must(active.l1_entry({0})).l2_table(), HostOffset{at(l2_table)});
    EXPECT_TRUE(must(active.l1_entry({0})).copied());
    EXPECT_FALSE(must(snapshot.l1_entry({0})).copied());
}

TEST_F(MappingTest, TheActiveTableIsWhereTheHeaderHasItNow) {
    set(at(snapshot_l1), at(snapshot_l2));
    set(at(snapshot_l2), zero);
    open();
    expect(lookup(0), ClusterKind::unallocated, coverage_);
    auto state = metadata_->state();
    state.l1_table = {at(snapshot_l1)};
    metadata_->replace_state(state);
    expect(lookup(0), ClusterKind::zero, 4096);
}

TEST_F(MappingTest, ADamagedL1EntryLosesWhatItMaps) {
    set(at(l1_table), at(l2_table) + 512);
    expect_damage(lookup(4096), 4096, coverage_ - 4096, {"image", "L1 entry at host offset 0x3000", "0x4200"});
    expect_damage(lookup(4096, 10), 4096, 10, {});
    expect(lookup(coverage_), ClusterKind::unallocated, coverage_);
}

TEST_F(MappingTest, ADamagedL2EntryLosesItsCluster) {
    l2(0, at(data) | copied);
    l2(1, at(data + 1) + 512);
    l2(2, at(data + 2));
    expect(lookup(0), ClusterKind::data, 4096, at(data));
    expect_damage(lookup(4096 + 7), 4096 + 7, 4096 - 7,
                  {"image", "L2 entry at host offset 0x4008", "guest offset 0x1007"});
    expect_damage(lookup(4096 + 7, 3), 4096 + 7, 3, {});
    expect(lookup(2 * 4096), ClusterKind::data, 4096, at(data + 2));
}

TEST_F(MappingTest, EqualDamageIsOneRange) {
    for (const std::uint64_t index : {1, 2, 3}) l2(index, at(data) + 512);
    l2(4, at(data) + 1024);
    expect_damage(lookup(4096 + 1), 4096 + 1, 3 * 4096 - 1, {});
    expect(lookup(0), ClusterKind::unallocated, 4096);
}

TEST_F(MappingTest, ReservedBitsDoNotKeepAnEntryFromBeingRead) {
    l2(0, at(data) | copied | 1 << 5);
    l2(1, at(data + 1) | copied | 1 << 5);
    expect(lookup(0), ClusterKind::data, 2 * 4096, at(data));
}

TEST_F(MappingTest, Version2HasNoZeros) {
    format(12, 0, 2);
    l2(0, zero);
    l2(1, at(data) | copied);
    expect_damage(lookup(0), 0, 4096, {"version 2"});
    expect(lookup(4096), ClusterKind::data, 4096, at(data));
}

TEST_F(MappingTest, AnExternalDataFileHasAFirstClusterAndNoStreams) {
    format(12, external_data);
    l2(0, copied);
    l2(1, 4096 | copied);
    l2(2, compressed | at(data));
    expect(lookup(0), ClusterKind::data, 2 * 4096, 0);
    expect(lookup(5000), ClusterKind::data, 2 * 4096 - 5000, 5000);
    expect_damage(lookup(2 * 4096), 2 * 4096, 4096, {"external data file"});
}

/// The second of two entries that are equal may be the one that is right.
TEST_F(MappingTest, InAnExternalDataFileAnEntryThatLeadsElsewhereLosesItsCluster) {
    format(12, external_data);
    l2(0, 4096 | copied);
    l2(1, 4096 | copied);
    expect_damage(lookup(0), 0, 4096, {"guest offset 0x0", "data file"});
    expect(lookup(4096), ClusterKind::data, 4096, 4096);
}

TEST_F(MappingTest, ATablePastTheEndOfTheFileIsNotTakenForAnEmptyOne) {
    set(at(l1_table, 8), at(40));
    expect_damage(lookup(coverage_ + 4096), coverage_ + 4096, coverage_ - 4096,
                  {"L1 entry at host offset 0x3008", "L2 table", "past the end"});
    expect(lookup(0), ClusterKind::unallocated, coverage_);
}

/// What is there of it can be read, but for zeros: they tell nothing.
TEST_F(MappingTest, OfATableThatWasCutTheEntriesAreReadThatAreThere) {
    set(at(l1_table), at(image_end - 1) | copied);
    const auto entry = [&](std::uint64_t index, std::uint64_t word) { set(at(image_end - 1, index * 8), word); };
    entry(0, at(data));
    entry(1, at(data + 1));
    entry(255, at(data + 3));
    bytes_.resize(at(image_end - 1) + 2048);
    expect(lookup(0), ClusterKind::data, 2 * 4096, at(data));
    expect_damage(lookup(2 * 4096), 2 * 4096, 253 * 4096, {"L1 entry", "past the end"});
    expect(lookup(255 * 4096), ClusterKind::data, 4096, at(data + 3));
    expect_damage(lookup(256 * 4096), 256 * 4096, 256 * 4096, {"L1 entry", "past the end"});
    expect_damage(lookup(256 * 4096, 512), 256 * 4096, 512, {});
}

/// Some writers leave out a table of zeros at the end of the file. Then no data are counted.
TEST_F(MappingTest, AnL1TableThatWasLeftOutMapsNothing) {
    set(test::field::l1_table_offset, at(image_end - 1));
    for (std::uint64_t number = l1_table; number < image_end - 1; ++number)
        bytes_[at(refcount_block, number * 2 + 1)] = std::byte{0};
    bytes_.resize(at(image_end - 1));
    expect(lookup(0), ClusterKind::unallocated, coverage_);
    expect(lookup(coverage_ + 4096), ClusterKind::unallocated, coverage_ - 4096);
}

TEST_F(MappingTest, AnL1TableThatWasCutOffIsDamage) {
    set(test::field::l1_table_offset, at(image_end - 1));
    set(at(image_end - 1), at(l2_table));
    l2(0, zero);
    bytes_.resize(at(image_end - 1) + 8);  // the first entry is there, the second is not
    expect(lookup(0), ClusterKind::zero, 4096);
    expect_damage(lookup(coverage_ + 4096), coverage_ + 4096, coverage_ - 4096,
                  {"L1 entry at host offset", "L1 table", "past the end"});
}

/// Once a page cannot be read, it is read by sectors.
TEST_F(MappingTest, AnL2SectorThatCannotBeReadLosesWhatItMaps) {
    for (std::uint64_t index = 0; index < 512; ++index) l2(index, zero);
    open(at(l2_table, 512));  // entries 64 to 127
    const std::uint64_t begin = 100 * 4096 + 5;
    expect_damage(lookup(begin), begin, 128 * 4096 - begin, {"bad sector"}, Errc::io);
    expect_damage(lookup(begin, 4096), begin, 4096, {"bad sector"}, Errc::io);
    expect(lookup(0), ClusterKind::zero, 64 * 4096);
    expect(lookup(63 * 4096 + 1), ClusterKind::zero, 4095);
    expect(lookup(128 * 4096), ClusterKind::zero, 64 * 4096);
}

TEST_F(MappingTest, AnL1SectorThatCannotBeReadLosesWhatTheEntryMaps) {
    open(at(l1_table));
    expect_damage(lookup(4096), 4096, coverage_ - 4096, {"bad sector"}, Errc::io);
    expect_damage(lookup(coverage_ + 1), coverage_ + 1, coverage_ - 1, {"bad sector"}, Errc::io);
}

class ExtendedMappingTest : public MappingTest {
protected:
    static constexpr std::uint64_t sub = 512;
    static constexpr std::uint64_t cluster = 32 * sub;
    static constexpr std::uint64_t all_data = 0xffff'ffff;
    static constexpr std::uint64_t all_zero = all_data << 32;

    ExtendedMappingTest() { format(14, extended_l2); }
};

TEST_F(ExtendedMappingTest, ARunGoesOnFromEntryToEntry) {
    l2(0, at(data) | copied, 0xffff'0000);
    l2(1, at(data + 1) | copied, all_data);
    l2(2, at(data + 2) | copied, 0x7);
    expect(lookup(0), ClusterKind::unallocated, 16 * sub);
    expect(lookup(20 * sub + 3), ClusterKind::data, (12 + 32 + 3) * sub - 3, at(data, 20 * sub + 3));
    EXPECT_TRUE(lookup(20 * sub)->copied);
    expect(lookup(20 * sub, 13 * sub), ClusterKind::data, 13 * sub, at(data, 20 * sub));
    expect(lookup(2 * cluster + 3 * sub), ClusterKind::unallocated, 29 * sub);
}

/// The data are contiguous in the guest, but not in the file.
TEST_F(ExtendedMappingTest, ARunEndsWhereTheNextClusterIsElsewhere) {
    l2(0, at(data) | copied, all_data);
    l2(1, at(data + 2) | copied, all_data);
    l2(2, at(data + 3), all_data);
    expect(lookup(0), ClusterKind::data, cluster, at(data));
    expect(lookup(cluster), ClusterKind::data, cluster, at(data + 2));
    expect(lookup(2 * cluster), ClusterKind::data, cluster, at(data + 3));
}

TEST_F(ExtendedMappingTest, ARunEndsInsideOfAnEntry) {
    l2(0, at(data), all_data);
    l2(1, at(data + 1), 0xffff | std::uint64_t{0xff} << 48);
    expect(lookup(0), ClusterKind::data, (32 + 16) * sub, at(data));
    expect(lookup(cluster + 16 * sub), ClusterKind::zero_allocated, 8 * sub, at(data + 1, 16 * sub));
    expect(lookup(cluster + 24 * sub), ClusterKind::unallocated, 8 * sub);
}

TEST_F(ExtendedMappingTest, ZerosWithAndWithoutAClusterAreNotAlike) {
    l2(0, 0, all_zero);
    l2(1, 0, all_zero);
    l2(2, at(data), all_zero);
    l2(3, at(data + 1), all_zero);
    expect(lookup(0), ClusterKind::zero, 2 * cluster);
    expect(lookup(2 * cluster), ClusterKind::zero_allocated, 2 * cluster, at(data));
    expect(lookup(4 * cluster), ClusterKind::unallocated, 252 * cluster);  // a page of the cache has 256 entries
}

/// The bit that marks zeros in entries that are not extended.
TEST_F(ExtendedMappingTest, OnlyTheBitmapSaysWhatReadsAsZeros) {
    l2(0, at(data) | zero, all_data);
    expect(lookup(0), ClusterKind::data, cluster, at(data));
}

TEST_F(ExtendedMappingTest, CompressedClustersAreOneRun) {
    l2(0, at(data), all_data);
    l2(1, compressed | at(data, 9), 0);
    l2(2, compressed | at(data, 700), 0);
    l2(3, at(data + 1), all_data);
    expect(lookup(0), ClusterKind::data, cluster, at(data));
    const auto mapped = lookup(cluster + sub);
    expect(mapped, ClusterKind::compressed, 2 * cluster - sub);
    EXPECT_EQ(mapped->compressed, (format::CompressedRange{{at(data, 9)}, 512 - 9}));
}

TEST_F(ExtendedMappingTest, DamageEndsARunAndLosesItsCluster) {
    l2(0, at(data), all_data);
    l2(1, at(data + 1), all_data | 1ULL << 32);
    l2(2, at(data + 1), all_data | 1ULL << 32);
    l2(3, 0, 1);
    l2(4, at(data + 4) + 512, all_data);
    expect(lookup(0), ClusterKind::data, cluster, at(data));
    expect_damage(lookup(cluster + sub), cluster + sub, 2 * cluster - sub, {"guest offset 0x4200", "both"});
    expect_damage(lookup(3 * cluster), 3 * cluster, cluster, {"no host cluster"});
    expect_damage(lookup(4 * cluster), 4 * cluster, cluster, {"multiple of the cluster size"});
}

TEST_F(ExtendedMappingTest, AnL2SectorThatCannotBeReadLosesWhatItMaps) {
    open(at(l2_table));  // entries 0 to 31
    expect_damage(lookup(5), 5, 32 * cluster - 5, {"bad sector"}, Errc::io);
    expect(lookup(32 * cluster), ClusterKind::unallocated, 32 * cluster);
}

TEST_F(ExtendedMappingTest, EntriesThatLookEmptyMayLiePastTheEndOfTheFile) {
    set(at(l1_table), at(image_end - 1) | copied);
    set(at(image_end - 1), at(data));  // nothing is allocated in it: it is as unallocated as zeros would be
    bytes_.resize(at(image_end - 1, 512));
    expect(lookup(0), ClusterKind::unallocated, cluster);
    expect_damage(lookup(cluster), cluster, 255 * cluster, {"L1 entry", "past the end"});
}

TEST_F(ExtendedMappingTest, AnExternalDataFileHasAFirstCluster) {
    format(14, extended_l2 | external_data);
    l2(0, copied, all_data);
    l2(1, cluster | copied, 1);
    expect(lookup(0), ClusterKind::data, 33 * sub, 0);
    expect(lookup(sub), ClusterKind::data, 32 * sub, sub);
}

/// Tables of anything: what a lookup says of a run is what each of its entries says by itself.
class RandomMappingTest : public MappingTest {
protected:
    struct Unit {
        bool damaged = false;
        ClusterKind kind = ClusterKind::unallocated;
        std::uint64_t host = 0;
        bool copied = false;
    };

    std::uint64_t random_word(test::Random& random, std::uint64_t previous, bool extended) {
        const std::uint64_t next = at(random.between(data, image_end - 1));
        switch (random.below(9)) {
            case 0: return 0;
            case 1: return extended ? 0 : zero;
            case 2: return next;
            case 3: return next | copied;
            case 4: return next | (extended ? 0 : zero);
            case 5: return compressed | (next + random.below(4000));
            case 6: return next + 512 * random.below(2);
            case 7: return previous;
            default: return previous + at(1);
        }
    }

    static std::uint64_t random_bitmap(test::Random& random, std::uint64_t previous) {
        const std::uint64_t ones = low_bits(static_cast<unsigned>(random.between(1, 32)));
        switch (random.below(8)) {
            case 0: return 0;
            case 1:
            case 2: return 0xffff'ffff;
            case 3: return 0xffff'ffffULL << 32;
            case 4: return ones;
            case 5: return (~ones & 0xffff'ffff) << 32 | ones;
            case 6: return ones << 32 | (random.chance(20) ? 1 : 0);
            default: return previous;
        }
    }

    void test(unsigned bits, std::uint64_t incompatible, std::string_view name) {
        auto random = test::Random::named(name);
        const bool extended = (incompatible & extended_l2) != 0;
        for (int round = 0; round < 10; ++round) {
            metadata_.reset();
            format(bits, incompatible);
            const std::uint64_t entries = bit(bits) / (extended ? 16 : 8);
            std::vector<format::L2Entry> table;
            format::L2Entry entry;
            for (std::uint64_t i = 0; i < entries; ++i) {
                if (i == 0 || !random.chance(50)) {
                    entry = {random_word(random, entry.word, extended), entry.bitmap};
                    entry.bitmap = extended ? random_bitmap(random, entry.bitmap) : 0;
                } else if (entry.cluster().value != 0 && !entry.compressed()) {
                    entry.word += at(1);
                }
                if ((incompatible & external_data) != 0 && random.chance(70) && !entry.compressed())
                    entry.word = entry.word == 0 ? 0 : i * bit(bits) | copied;
                table.push_back(entry);
                extended ? l2(i, entry.word, entry.bitmap) : l2(i, entry.word);
            }
            open();
            const std::uint64_t unit_size = extended ? bit(bits) / 32 : bit(bits);
            const auto unit_at = [&](std::uint64_t guest) {
                const auto& rules = metadata_->rules();
                const auto& of = table[guest >> bits];
                const auto flaw = rules.flaw(of, {align_down(guest, bit(bits))});
                if (flaw && flaw->unreadable) return Unit{.damaged = true};
                const auto inside = guest % bit(bits);
                return Unit{false, rules.run(of, static_cast<unsigned>(inside / unit_size)).kind,
                            of.cluster().value + inside, of.copied()};
            };
            for (int look = 0; look < 300; ++look) {
                const std::uint64_t guest = random.below(coverage_);
                const std::uint64_t limit = random.pick({random.between(1, 20 * bit(bits)), no_limit});
                const auto mapped = lookup(guest, limit);
                const auto first = unit_at(guest);
                ASSERT_EQ(first.damaged, !mapped) << guest << ", " << test::replay_hint();
                const auto length = mapped ? mapped->length : mapped.error().unreadable.length;
                if (!mapped) {
                    ASSERT_EQ(mapped.error().unreadable.start.value, guest);
                }
                ASSERT_GT(length, 0U);
                ASSERT_LE(length, std::min(limit, coverage_ - guest));
                for (std::uint64_t i = 0; i < length; i += std::min(unit_size - (guest + i) % unit_size, length - i)) {
                    const auto unit = unit_at(guest + i);
                    ASSERT_EQ(unit.damaged, first.damaged) << guest << "+" << i << ", " << test::replay_hint();
                    if (!mapped) continue;
                    ASSERT_EQ(static_cast<int>(unit.kind), static_cast<int>(mapped->kind))
                        << guest << "+" << i << ", " << test::replay_hint();
                    if (unit.kind == ClusterKind::compressed) continue;
                    ASSERT_EQ(unit.copied, mapped->copied);
                    if (has_host(unit.kind)) {
                        ASSERT_EQ(unit.host, mapped->host.value + i) << guest << ", " << test::replay_hint();
                    }
                }
            }
        }
    }
};

TEST_F(RandomMappingTest, WholeClusters) { test(12, 0, "mapping"); }
TEST_F(RandomMappingTest, Subclusters) { test(14, extended_l2, "mapping of subclusters"); }
TEST_F(RandomMappingTest, InAnExternalDataFile) { test(14, extended_l2 | external_data, "external mapping"); }

}  // namespace
}  // namespace qcow::qcow2
