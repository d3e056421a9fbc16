#include "qcow2/walker.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>
#include <set>

#include "qcow2/metadata/metadata_map.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow::qcow2 {
namespace {

using test::Bytes;
using test::fails;
using test::joined;
using test::must;
using test::u16;
using test::u32;
using test::u64;
using test::u8;
using test::with;
using test::with_u32;
using test::with_u64;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr std::uint64_t cluster_size = 512;
constexpr std::uint64_t copied = std::uint64_t{1} << 63;
constexpr std::uint64_t compressed = std::uint64_t{1} << 62;

/// Where the structures of the image lie, in host clusters. The encryption header takes two.
enum Cluster : std::uint64_t {
    header = 0,
    refcount_table = 1,
    refcount_block = 2,
    l1_table = 3,
    l2_table = 4,
    data = 5,
    stream = 7,
    snapshot_table = 8,
    snapshot_l1 = 9,
    snapshot_l2 = 10,
    snapshot_data = 11,
    bitmap_directory = 12,
    bitmap_table = 13,
    bits = 14,
    encryption = 15,
    image_end = 17
};

constexpr std::uint64_t at(std::uint64_t cluster, std::uint64_t byte = 0) { return cluster * cluster_size + byte; }

/// An image with one reference of each kind: a disk of 32 KiB, which one L2 table maps.
Bytes image() {
    auto bytes = test::repeated(at(image_end), 0);
    const auto put = [&](std::uint64_t cluster, const Bytes& content) { bytes = with(bytes, at(cluster), content); };
    put(header, joined({
                    u32(0x514649fb),
                    u32(3),
                    u64(0),
                    u32(0),
                    u32(9),
                    u64(32768),
                    u32(2),  // encrypted with LUKS
                    u32(1),
                    u64(at(l1_table)),
                    u64(at(refcount_table)),
                    u32(1),  //
                    u32(1),
                    u64(at(snapshot_table)),  //
                    u64(0),
                    u64(0),
                    u64(1),
                    u32(4),
                    u32(112),
                    u64(0),  // the bitmaps are consistent
                    u32(0x0537be77),
                    u32(16),
                    u64(at(encryption)),
                    u64(592),  //
                    u32(0x23852875),
                    u32(24),
                    u32(1),
                    u32(0),
                    u64(32),
                    u64(at(bitmap_directory)),
                }));
    put(refcount_table, u64(at(refcount_block)));
    put(l1_table, u64(at(l2_table) | copied));
    put(l2_table, joined({u64(at(data) | copied), u64(at(data + 1) | copied), u64(at(stream) | compressed)}));
    put(snapshot_table, joined({u64(at(snapshot_l1)), u32(1), u16(1), u16(1), u32(0), u32(0), u64(0), u32(0), u32(16),
                                u64(0), u64(32768), test::text_bytes("1s")}));
    put(snapshot_l1, u64(at(snapshot_l2)));
    put(snapshot_l2, u64(at(snapshot_data)));
    put(bitmap_directory,
        joined({u64(at(bitmap_table)), u32(1), u32(0), u8(1), u8(9), u16(1), u32(0), test::text_bytes("b"),
                test::repeated(7, 0),
                // Another one of that name, which is in use and has no table. The header does not count it.
                u64(0), u32(0), u32(1), u8(1), u8(9), u16(1), u32(0), test::text_bytes("b"), test::repeated(7, 0)}));
    put(bitmap_table, u64(at(bits)));
    return bytes;
}

/// Writes down what a walk tells it.
class Notes : public Visitor {
public:
    explicit Notes(unsigned cluster_bits = 9) : cluster_bits_(cluster_bits) {}

    Result<void> reference(const Reference& reference) override {
        const auto first = reference.at.value >> cluster_bits_;
        const auto last = (reference.at.value + reference.bytes - 1) >> cluster_bits_;
        const std::lock_guard lock(mutex_);
        for (auto cluster = first; cluster <= last; ++cluster) used_.insert(cluster);
        references.push_back(fmt::format("{} leads to {} {}+{} x{}{}{}", text_of(reference.place),
                                         static_cast<int>(reference.kind), first, last - first + 1, reference.count,
                                         reference.active ? " active" : "", reference.copied ? " copied" : ""));
        return {};
    }

    Result<void> flaw(const Flaw& flaw) override {
        const std::lock_guard lock(mutex_);
        kinds.push_back(flaw.kind);
        hides = hides || flaw.hides_references;
        findings.push_back(finding_of(flaw, cluster_bits_));
        return {};
    }

    [[nodiscard]] std::uint64_t next_used(std::uint64_t first, std::uint64_t end) const override {
        const auto found = used_.lower_bound(first);
        return found == used_.end() ? end : std::min(*found, end);
    }

    std::vector<std::string> references;
    std::vector<Flaw::Kind> kinds;
    std::vector<CheckFinding> findings;
    bool hides = false;

private:
    unsigned cluster_bits_;
    std::mutex mutex_;
    std::set<std::uint64_t> used_;
};

std::unique_ptr<Metadata> open(Bytes bytes) {
    const auto first = test::first(bytes, cluster_size);
    return std::make_unique<Metadata>(must(format::parse_header(first)), memory_storage(std::move(bytes), "image"),
                                      1 << 20);
}

MappedClusters walk_through(const Metadata& metadata, Visitor& visitor, const WalkOptions& options = {}) {
    return must(walk(metadata, must(walked_length(metadata)), options, visitor));
}

std::string told(std::string_view place, Structure kind, std::string_view rest) {
    return fmt::format("{} leads to {} {}", place, static_cast<int>(kind), rest);
}

const std::string bitmap_place = "bitmap \"b\" (table at host offset 0x1a00): table";
const std::string snapshot_place = "L1 table of snapshot \"s\" at host offset 0x1200";
const std::string active_place = "active L1 table at host offset 0x600";

TEST(WalkerTest, EachReferenceIsVisitedOnceAtItsPlace) {
    Notes notes;
    const auto metadata = open(image());
    const auto mapped = walk_through(*metadata, notes);
    EXPECT_THAT(
        notes.references,
        ElementsAre(told("header", Structure::header, "0+1 x1"),
                    told("refcount table", Structure::refcount_table, "1+1 x1"),
                    told("encryption header", Structure::encryption_header, "15+2 x1"),
                    told("refcount table entry 0: refcount block", Structure::refcount_block, "2+1 x1"),
                    told("bitmap directory", Structure::bitmap_directory, "12+1 x1"),
                    told(bitmap_place, Structure::bitmap_table, "13+1 x1"),
                    told(bitmap_place + " entry 0", Structure::bitmap_bits, "14+1 x1"),
                    told(active_place, Structure::l1_table, "3+1 x1"),
                    told(active_place + ": entry 0", Structure::l2_table, "4+1 x1 active copied"),
                    told("snapshot table", Structure::snapshot_table, "8+1 x1"),
                    told(snapshot_place, Structure::l1_table, "9+1 x1"),
                    told(snapshot_place + ": entry 0", Structure::l2_table, "10+1 x1"),
                    told("L2 entry at host offset 0x800 (guest offset 0x0)", Structure::data, "5+2 x1 active copied"),
                    told("L2 entry at host offset 0x810 (guest offset 0x400)", Structure::compressed, "7+1 x1 active"),
                    told("L2 entry at host offset 0x1400 (guest offset 0x0)", Structure::data, "11+1 x1")));
    EXPECT_THAT(notes.kinds, IsEmpty());
    EXPECT_EQ(mapped.allocated, 3U);
    EXPECT_EQ(mapped.compressed, 1U);
}

/// A snapshot and the disk share an L2 table as long as neither is written.
TEST(WalkerTest, ASharedTableIsVisitedOnceForAll) {
    Notes notes;
    walk_through(*open(with_u64(image(), at(snapshot_l1), at(l2_table))), notes);
    EXPECT_THAT(notes.references, testing::Contains(told("L2 entry at host offset 0x800 (guest offset 0x0)",
                                                         Structure::data, "5+2 x2 active copied")));
    EXPECT_THAT(notes.references, testing::Not(testing::Contains(HasSubstr("host offset 0x1400"))));
}

TEST(WalkerTest, AWalkForTheGuardFollowsNoL2Table) {
    Notes notes;
    WalkOptions options;
    options.guest_data = false;
    walk_through(*open(image()), notes, options);
    ASSERT_EQ(notes.references.size(), 11U);
    EXPECT_EQ(notes.references.back(), told(snapshot_place, Structure::l1_table, "9+1 x1"));
}

/// One change of the image, and what a walk says of it.
struct Damage {
    std::string name;
    std::uint64_t offset;
    Bytes bytes;
    Flaw::Kind kind;
    std::string place;
    std::string what;
    CheckFinding::Kind finding;
    CheckFinding::Remedy remedy;
    std::uint64_t cluster;
    bool hides;
};

std::vector<Damage> damages() {
    using Kind = Flaw::Kind;
    using Finding = CheckFinding::Kind;
    using Remedy = CheckFinding::Remedy;
    const std::string l2_entry = "L2 entry at host offset 0x800";
    return {
        {"no refcount table", 48, u64(at(99)), Kind::unusable, "header field refcount_table",
         "no refcount was compared", Finding::bad_table, Remedy::rebuild_refcounts, header, false},
        {"a snapshot table that is none", at(snapshot_table, 36), u32(0), Kind::unusable, "snapshot table entry 0",
         "at least 16", Finding::bad_table, Remedy::remove_snapshot, snapshot_table, true},
        {"a snapshot without its L1 table", at(snapshot_table), u64(at(99)), Kind::unusable,
         "L1 table of snapshot \"s\"", "do not lie within the file", Finding::bad_table, Remedy::remove_snapshot, 99,
         true},
        {"a bitmap directory that is none", at(bitmap_directory, 16), u8(7), Kind::unusable, "bitmap directory",
         "dirty tracking", Finding::bad_table, Remedy::remove_bitmap, bitmap_directory, true},
        {"a bitmap's table between clusters", at(bitmap_directory), u64(at(40, 8)), Kind::misaligned,
         "bitmap \"b\" (table at host offset 0x5008): table", "host offset 0x5008 is not a multiple",
         Finding::misaligned, Remedy::remove_bitmap, 40, true},
        {"a refcount block past the end", at(refcount_table), u64(at(99)), Kind::past_end,
         "refcount table entry 0: refcount block", "its 512 bytes at host offset 0xc600 reach past the end",
         Finding::past_end, Remedy::rebuild_refcounts, 99, true},
        {"an L2 table past the end", at(l1_table), u64(copied | at(99)), Kind::past_end, active_place + ": entry 0",
         "the L2 table at 0xc600 reaches past the end", Finding::past_end, Remedy::drop_entry, l1_table, true},
        {"data past the end", at(l2_table), u64(copied | at(99)), Kind::past_end, l2_entry,
         "the cluster at host offset 0xc600 lies past the end of the file", Finding::past_end, Remedy::drop_entry,
         l2_table, true},
        {"a stream past the end", at(l2_table), u64(compressed | at(99)), Kind::past_end, l2_entry,
         "the compressed cluster at host offset 0xc600 lies past", Finding::past_end, Remedy::drop_entry, 99, true},
        {"a stream that goes on past the end", at(l2_table),
         u64(compressed | std::uint64_t{1} << 61 | at(image_end - 1)), Kind::past_end, l2_entry,
         "the compressed cluster at host offset 0x2000 reaches past", Finding::past_end, Remedy::copy_contents,
         image_end - 1, false},
        {"a bitmap's table in the refcounts", at(bitmap_directory), u64(at(refcount_block)), Kind::overlap,
         "bitmap \"b\" (table at host offset 0x400): table",
         "its 8 bytes at host offset 0x400 overlap other metadata at 0x400", Finding::overlap, Remedy::remove_bitmap,
         refcount_block, true},
        {"a bitmap of another disk", at(bitmap_directory, 8), u32(3), Kind::wrong_length, "bitmap \"b\"",
         "its table has 3 entries, but the disk needs 1", Finding::wrong_length, Remedy::remove_bitmap, bitmap_table,
         false},
        {"a refcount table entry with more bits", at(refcount_table), u64(at(refcount_block, 1)), Kind::reserved_bits,
         "refcount table entry 0", "reserved bits are set (0x401)", Finding::reserved_bits, Remedy::rebuild_refcounts,
         refcount_table, false},
        {"an L1 entry with more bits", at(l1_table), u64(copied | at(l2_table, 1)), Kind::reserved_bits,
         active_place + ": entry 0", "reserved bits are set", Finding::reserved_bits, Remedy::correct_entry, l1_table,
         false},
        {"a bitmap's entry with more bits", at(bitmap_table), u64(at(bits, 2)), Kind::reserved_bits,
         bitmap_place + " entry 0", "reserved bits are set (0x1c02)", Finding::reserved_bits, Remedy::remove_bitmap,
         bitmap_table, false},
        {"an L2 entry with more bits", at(l2_table), u64(copied | at(data, 2)), Kind::reserved_bits, l2_entry,
         "reserved bits are set (0x8000000000000a02)", Finding::reserved_bits, Remedy::correct_entry, l2_table, false},
        {"COPIED without an L2 table", at(l1_table), u64(copied), Kind::copied_flag, active_place + ": entry 0",
         "COPIED, but there is no L2 table", Finding::copied_flag, Remedy::correct_entry, l1_table, false},
        {"COPIED without data", at(l2_table), u64(copied), Kind::copied_flag, l2_entry,
         "COPIED, but there is no host cluster", Finding::copied_flag, Remedy::correct_entry, l2_table, false},
        {"two bitmaps of one name", 144, joined({u32(2), u32(0), u64(64)}), Kind::duplicate, "bitmap directory",
         "there is more than one bitmap \"b\"", Finding::duplicate_name, Remedy::remove_bitmap, bitmap_directory,
         false},
        {"bitmaps without an extension", 136, u32(0x99999999), Kind::stale_autoclear,
         "header field autoclear_features (byte 88)", "bitmaps without a bitmaps extension", Finding::bad_header,
         Remedy::correct_entry, header, false},
        {"a bitmap with extra data", at(bitmap_directory, 12), u32(4), Kind::refused_bitmap, "bitmap \"b\"",
         "extra data", Finding::bad_entry, Remedy::correct_entry, bitmap_table, false},
        {"a bitmap with a granularity of 2^8", at(bitmap_directory, 17), u8(8), Kind::refused_bitmap, "bitmap \"b\"",
         "granularity", Finding::bad_entry, Remedy::remove_bitmap, bitmap_table, false},
        {"raw data without a data file", 88, u64(3), Kind::stale_autoclear, "header field autoclear_features (byte 88)",
         "raw external data", Finding::bad_header, Remedy::correct_entry, header, false},
    };
}

TEST(WalkerTest, EachFlawIsToldAtItsPlace) {
    for (const auto& damage : damages()) {
        SCOPED_TRACE(damage.name);
        Notes notes;
        walk_through(*open(with(image(), damage.offset, damage.bytes)), notes);
        ASSERT_THAT(notes.kinds, ElementsAre(damage.kind));
        const auto& finding = notes.findings.front();
        EXPECT_THAT(finding.place, HasSubstr(damage.place));
        EXPECT_THAT(finding.what, HasSubstr(damage.what));
        EXPECT_EQ(finding.kind, damage.finding);
        EXPECT_EQ(finding.remedy, damage.remedy);
        EXPECT_EQ(finding.cluster, HostOffset{at(damage.cluster)});
        EXPECT_EQ(notes.hides, damage.hides);
    }
}

/// Offsets between clusters of 512 bytes do not fit into an L1 or L2 entry.
TEST(WalkerTest, LargerClustersHaveEntriesThatLeadBetweenThem) {
    auto bytes =
        with(test::repeated(8 << 12, 0), 0,
             joined({u32(0x514649fb), u32(3), u64(0), u32(0), u32(12), u64(4 << 20), u32(0), u32(2), u64(3 << 12),
                     u64(1 << 12), u32(1), u32(0), u64(0), u64(0), u64(0), u64(0), u32(4), u32(112), u64(0)}));
    bytes = with(bytes, 1 << 12, u64(2 << 12));
    bytes = with(bytes, 3 << 12, joined({u64(copied | 4 << 12), u64(copied | 0x5200)}));
    bytes = with(bytes, 4 << 12, u64(copied | 0x6200));
    Notes notes(12);
    walk_through(*open(bytes), notes);
    EXPECT_THAT(notes.kinds, ElementsAre(Flaw::Kind::misaligned, Flaw::Kind::misaligned));
    ASSERT_EQ(notes.findings.size(), 2U);
    EXPECT_EQ(notes.findings[0].place, "active L1 table at host offset 0x3000: entry 1");
    EXPECT_EQ(notes.findings[0].what, "the L2 table's offset 0x5200 is not a multiple of the cluster size");
    EXPECT_EQ(notes.findings[1].place, "L2 entry at host offset 0x4000 (guest offset 0x0)");
    EXPECT_THAT(notes.findings[1].what, HasSubstr("its host offset is not a multiple of the cluster size"));
    EXPECT_EQ(notes.findings[1].remedy, CheckFinding::Remedy::drop_entry);
}

/// Data in another file have a place of their own, and are no references.
TEST(WalkerTest, AnExternalDataFile) {
    auto bytes = with_u64(image(), 72, 4);  // external data
    bytes = with_u64(bytes, 88, 2);         // which are raw
    bytes = with_u32(bytes, 60, 0);         // no snapshot
    bytes = with(bytes, at(l2_table), joined({u64(copied), u64(copied | at(0)), u64(at(2))}));
    bytes = with_u64(bytes, at(l2_table, 63 * 8), compressed | at(5));
    const auto data_file = memory_storage(Bytes(at(2)), "data.raw");
    WalkOptions options;
    options.data_file = data_file.get();
    Notes notes;
    walk_through(*open(bytes), notes, options);
    EXPECT_THAT(notes.kinds,
                testing::UnorderedElementsAre(Flaw::Kind::data_file_cut,
                                              Flaw::Kind::misplaced,  // the second cluster lies at the first's place
                                              Flaw::Kind::copied_flag, Flaw::Kind::past_end,  // the third one
                                              Flaw::Kind::contradiction));                    // compressed
    EXPECT_THAT(notes.references, testing::Not(testing::Contains(HasSubstr("L2 entry"))));
}

TEST(WalkerTest, OnlyTheGuardMindsHowLongTablesAre) {
    const auto metadata = open(with_u32(image(), at(snapshot_table, 8), 5 << 20));
    WalkOptions options;
    options.guest_data = false;
    Notes guarded;
    walk_through(*metadata, guarded, options);
    EXPECT_THAT(guarded.kinds, ElementsAre(Flaw::Kind::too_long));
    MetadataMap map(9);
    EXPECT_TRUE(fails(map.load(*metadata), Errc::limit_exceeded, {"snapshot \"s\"", "5242880 entries", "32 MiB"}));
}

TEST(WalkerTest, TheGuardRefusesWhatHidesMetadata) {
    MetadataMap sound(9);
    must(sound.load(*open(image())));
    EXPECT_EQ(sound.find({at(bits)}, 1), "a bitmap");
    EXPECT_EQ(sound.find({at(data)}, 1), "");
    MetadataMap overlapping(9);
    EXPECT_TRUE(fails(overlapping.load(*open(with_u64(image(), at(bitmap_directory), at(refcount_block)))),
                      Errc::corrupt, {"a refcount block and a bitmap overlap here"}));
    MetadataMap cut(9);
    EXPECT_TRUE(fails(cut.load(*open(with_u64(image(), at(l1_table), at(99)))), Errc::corrupt,
                      {"an L2 table at host offset 0xc600"}));
    MetadataMap harmless(9);
    must(harmless.load(*open(with_u64(image(), at(l1_table), at(l2_table, 1)))));
}

/// A visitor that has seen enough.
TEST(WalkerTest, AnErrorOfTheVisitorEndsTheWalk) {
    class Impatient : public Notes {
    public:
        Result<void> reference(const Reference& reference) override {
            if (reference.kind == Structure::l2_table) return std::unexpected(Error{Errc::io, "here", "enough"});
            return Notes::reference(reference);
        }
    };
    const auto metadata = open(image());
    Impatient visitor;
    EXPECT_TRUE(fails(walk(*metadata, must(walked_length(*metadata)), {}, visitor), Errc::io, {"enough"}));
    EXPECT_EQ(visitor.references.size(), 8U);
}

}  // namespace
}  // namespace qcow::qcow2
