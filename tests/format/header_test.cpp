#include "format/header.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/qcow2_header.h"
#include "support/result.h"

namespace qcow::format {
namespace {

using namespace qcow::test;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

constexpr std::uint64_t all_ones = ~std::uint64_t{0};

Result<Header> parse(const Bytes& cluster) { return parse_header(cluster); }

using Verify = Result<void> (*)(const HeaderState&, unsigned, std::uint64_t);

/// What is said of a table that reading does not need; the header is read all the same.
Result<void> verified(Verify verify, const Bytes& cluster, std::uint64_t file_size = header_file_size) {
    const auto header = must(parse(cluster));
    return verify(header, header.cluster_bits, file_size);
}

// ---- What it takes to know the cluster size ----

TEST(HeaderBytes, IsTheClusterSizeAndNeedsTheVersion2HeaderOnly) {
    EXPECT_EQ(must(header_bytes(first(header_v2(), 72))), 65536U);
    EXPECT_EQ(must(header_bytes(first(header_v3(), 72))), 65536U);
}

TEST(HeaderBytes, RefusesAFileThatIsTooShort) {
    EXPECT_TRUE(fails(header_bytes(first(header_v2(), 71)), Errc::corrupt, {"header: the file has 71 bytes"}));
    EXPECT_TRUE(fails(header_bytes({}), Errc::corrupt, {"the file has 0 bytes"}));
}

TEST(HeaderBytes, RefusesAnotherMagic) {
    EXPECT_TRUE(fails(header_bytes(with_u8(header_v3(), field::magic + 3, 0xfa)), Errc::corrupt,
                      {"header field magic (byte 0)", "not a qcow2 image"}));
}

TEST(HeaderBytes, RefusesVersionsOtherThan2And3) {
    const auto with_version = [](std::uint32_t version) { return with_u32(header_v3(), field::version, version); };
    EXPECT_TRUE(fails(header_bytes(with_version(0)), Errc::unsupported, {"header field version (byte 4): 0"}));
    EXPECT_TRUE(fails(header_bytes(with_version(1)), Errc::unsupported, {"header field version (byte 4): 1"}));
    EXPECT_TRUE(fails(header_bytes(with_version(4)), Errc::unsupported, {"header field version (byte 4): 4"}));
    EXPECT_TRUE(fails(header_bytes(with_version(0xffffffff)), Errc::unsupported, {"4294967295"}));
}

TEST(HeaderBytes, TakesClusterBitsFrom9To21) {
    const auto with_bits = [](std::uint32_t bits) { return with_u32(header_v3(), field::cluster_bits, bits); };
    EXPECT_EQ(must(header_bytes(with_bits(9))), 512U);
    EXPECT_EQ(must(header_bytes(with_bits(21))), 2U << 20);
    EXPECT_TRUE(fails(header_bytes(with_bits(8)), Errc::corrupt, {"header field cluster_bits (byte 20): 8"}));
    EXPECT_TRUE(fails(header_bytes(with_bits(22)), Errc::corrupt, {"header field cluster_bits (byte 20): 22"}));
    EXPECT_TRUE(fails(header_bytes(with_bits(0xffffffff)), Errc::corrupt, {"header field cluster_bits (byte 20)"}));
}

// ---- The fields ----

TEST(Header, ReadsVersion2) {
    const auto h = must(parse(header_v2()));
    EXPECT_EQ(h.version, 2U);
    EXPECT_EQ(h.cluster_bits, 16U);
    EXPECT_EQ(h.cluster_size(), 65536U);
    EXPECT_EQ(h.size, 512U << 20);
    EXPECT_EQ(h.crypt, Crypt::none);
    EXPECT_EQ(h.l1_entries, 1U);
    EXPECT_EQ(h.l1_table, HostOffset{4 << 20});
    EXPECT_EQ(h.refcount_table, HostOffset{2 << 20});
    EXPECT_EQ(h.refcount_table_clusters, 1U);
    EXPECT_EQ(h.snapshot_count, 0U);
    EXPECT_EQ(h.backing_name, "");
    // What version 2 does not have:
    EXPECT_EQ(h.incompatible, 0U);
    EXPECT_EQ(h.compatible, 0U);
    EXPECT_EQ(h.autoclear, 0U);
    EXPECT_EQ(h.refcount_order, 4U);
    EXPECT_EQ(h.header_length, 72U);
    EXPECT_EQ(h.compression, Compression::zlib);
}

TEST(Header, ReadsVersion3) {
    const auto h = must(parse(header_v3()));
    EXPECT_EQ(h.version, 3U);
    EXPECT_EQ(h.size, 512U << 20);
    EXPECT_EQ(h.l1_table, HostOffset{4 << 20});
    EXPECT_EQ(h.refcount_order, 4U);
    EXPECT_EQ(h.header_length, 112U);
    EXPECT_EQ(h.compression, Compression::zlib);
    EXPECT_THAT(h.unknown_extensions, IsEmpty());
}

TEST(Header, Version2HasExtensionsWhereVersion3HasFeatures) {
    const auto in = with(header_v2(), 72, extension(0xe2792aca, text_bytes("raw")));
    const auto h = must(parse(in));
    EXPECT_EQ(h.backing_format, "raw");
    EXPECT_EQ(h.incompatible, 0U);
}

TEST(Header, NeedsNoMoreThanTheFileHas) {
    // A file that is shorter than its first cluster, as far as the header goes.
    EXPECT_EQ(must(parse(first(header_v2(), 72))).version, 2U);
    EXPECT_EQ(must(parse(first(header_v3(), 112))).version, 3U);
}

TEST(Header, Version3EndsWithinTheFile) {
    EXPECT_TRUE(fails(parse(first(header_v3(), 103)), Errc::corrupt, {"header: the file ends", "103 bytes"}));
    EXPECT_TRUE(fails(parse(first(header_v3(), 111)), Errc::corrupt,
                      {"header field header_length (byte 100)", "112 reaches past the end of the file (111 bytes)"}));
}

TEST(Header, LooksAtTheFirstClusterOnly) {
    // The backing file name begins within the 512 bytes of the first cluster and ends behind it.
    auto in = with_u64(with_u32(header_v3(), field::cluster_bits, 9), field::size, 32768);
    in = with_u32(with_u64(in, field::backing_file_offset, 500), field::backing_file_size, 12);
    EXPECT_EQ(must(parse(in)).backing_name.size(), 12U);
    EXPECT_TRUE(fails(parse(with_u32(in, field::backing_file_size, 13)), Errc::corrupt,
                      {"header field backing_file_offset (byte 8)"}));
}

TEST(Header, TakesTheSmallestAndTheLargestClusters) {
    const auto small = with_u64(with_u32(header_v3(), field::cluster_bits, 9), field::size, 32768);
    EXPECT_EQ(must(parse(small)).cluster_size(), 512U);
    const auto large = with_u32(header_v3(), field::cluster_bits, 21);
    EXPECT_EQ(must(parse(large)).cluster_size(), 2U << 20);
}

TEST(Header, BackingFileNameIsTakenAsItIs) {
    auto in = with_u32(with_u64(header_v3(), field::backing_file_offset, 512), field::backing_file_size, 9);
    in = with(in, 512, text_bytes("base.img\nNOT THE NAME"));
    EXPECT_EQ(must(parse(in)).backing_name, "base.img\n");
}

TEST(Header, BackingFileOffset0IsNoBackingFile) {
    EXPECT_EQ(must(parse(with_u32(header_v3(), field::backing_file_size, 8))).backing_name, "");
}

TEST(Header, BackingFileNameHasAtMost1023Bytes) {
    const auto in = with_u64(header_v3(), field::backing_file_offset, 1024);
    EXPECT_EQ(must(parse(with_u32(in, field::backing_file_size, 1023))).backing_name.size(), 1023U);
    EXPECT_TRUE(fails(parse(with_u32(in, field::backing_file_size, 1024)), Errc::corrupt,
                      {"header field backing_file_offset (byte 8)", "1024 bytes", "at most 1023"}));
    EXPECT_TRUE(fails(parse(with_u32(in, field::backing_file_size, 0xffffffff)), Errc::corrupt,
                      {"header field backing_file_offset (byte 8)", "4294967295 bytes"}));
}

TEST(Header, BackingFileNameLiesBetweenTheHeaderAndTheEndOfTheCluster) {
    const auto in = with_u32(header_v3(), field::backing_file_size, 8);
    const auto with_offset = [&](std::uint64_t at) { return with_u64(in, field::backing_file_offset, at); };
    EXPECT_TRUE(parse(with_offset(112)));
    EXPECT_TRUE(parse(with_offset(65536 - 8)));
    EXPECT_TRUE(fails(parse(with_offset(111)), Errc::corrupt, {"backing_file_offset (byte 8)", "0x6f"}));
    EXPECT_TRUE(fails(parse(with_offset(65536 - 7)), Errc::corrupt, {"backing_file_offset (byte 8)", "0xfff9"}));
    EXPECT_TRUE(fails(parse(with_offset(all_ones)), Errc::corrupt, {"backing_file_offset (byte 8)"}));
    EXPECT_TRUE(fails(parse(with_offset(all_ones - 7)), Errc::corrupt, {"backing_file_offset (byte 8)"}));
}

TEST(Header, VirtualSizeIsWhatTheL1TableCanMap) {
    // One L2 table of 8192 entries maps 512 MiB.
    EXPECT_TRUE(parse(with_u64(header_v3(), field::size, 0)));
    EXPECT_TRUE(fails(parse(with_u64(header_v3(), field::size, (512 << 20) + 1)), Errc::corrupt,
                      {"header field l1_size (byte 36)", "1 entries", "536870913 bytes needs 2"}));
    EXPECT_TRUE(
        fails(parse(with_u64(header_v3(), field::size, all_ones)), Errc::corrupt, {"header field l1_size (byte 36)"}));
}

TEST(Header, ExtendedL2TablesMapHalfAsMuch) {
    const auto in = with_u64(header_v3(), field::incompatible_features, 1 << 4);
    EXPECT_TRUE(parse(with_u64(in, field::size, 256 << 20)));
    EXPECT_TRUE(fails(parse(with_u64(in, field::size, (256 << 20) + 1)), Errc::corrupt, {"l1_size (byte 36)"}));
}

TEST(Header, CryptMethods) {
    const auto with_method = [](std::uint32_t method) { return with_u32(header_v3(), field::crypt_method, method); };
    EXPECT_EQ(must(parse(with_method(1))).crypt, Crypt::aes);
    EXPECT_TRUE(fails(parse(with_method(3)), Errc::unsupported, {"header field crypt_method (byte 32): 3"}));
    EXPECT_TRUE(fails(parse(with_method(0xffffffff)), Errc::unsupported, {"crypt_method (byte 32)"}));
}

TEST(Header, LuksNeedsItsExtension) {
    const auto in = with_u32(header_v3(), field::crypt_method, 2);
    EXPECT_TRUE(fails(parse(in), Errc::corrupt, {"header field crypt_method (byte 32)", "extension", "missing"}));
    const auto h = must(parse(with(in, extensions_v3, extension(0x0537be77, joined({u64(0x50000), u64(0x1f0000)})))));
    EXPECT_EQ(h.crypt, Crypt::luks);
    EXPECT_EQ(h.encryption->offset, HostOffset{0x50000});
    EXPECT_EQ(h.encryption->length, 0x1f0000U);
}

TEST(Header, L1TableHasAtMost32MiB) {
    const auto with_entries = [](std::uint32_t entries) { return with_u32(header_v3(), field::l1_size, entries); };
    EXPECT_EQ(must(parse(with_entries(4 << 20))).l1_entries, 4U << 20);
    EXPECT_TRUE(fails(parse(with_entries((4 << 20) + 1)), Errc::limit_exceeded,
                      {"header field l1_size (byte 36)", "4194305 entries"}));
    EXPECT_TRUE(fails(parse(with_entries(0xffffffff)), Errc::limit_exceeded, {"header field l1_size (byte 36)"}));
}

TEST(Header, L1TableIsAligned) {
    const auto with_offset = [](std::uint64_t at) { return with_u64(header_v3(), field::l1_table_offset, at); };
    EXPECT_TRUE(fails(parse(with_offset(0)), Errc::corrupt, {"header field l1_table_offset (byte 40)"}));
    EXPECT_TRUE(fails(parse(with_offset((4 << 20) + 512)), Errc::corrupt,
                      {"header field l1_table_offset (byte 40): 0x400200 is not a multiple of the cluster size"}));
    EXPECT_TRUE(fails(parse(with_offset(all_ones << 16)), Errc::corrupt, {"header field l1_table_offset (byte 40)"}));
}

TEST(Header, L1TableLiesWhereAnEntryCouldPoint) {
    const std::uint64_t first_unreachable = std::uint64_t{1} << 56;
    const auto in = with_u64(header_v3(), field::l1_table_offset, first_unreachable);
    EXPECT_TRUE(fails(parse(in), Errc::corrupt,
                      {"header field l1_table_offset (byte 40)", "more than the format can address"}));
    EXPECT_TRUE(parse(with_u64(in, field::l1_table_offset, first_unreachable - 65536)));
}

TEST(Header, ADiskOfNoBytesNeedsNoL1Table) {
    const auto in = with_u32(with_u64(header_v3(), field::size, 0), field::l1_size, 0);
    EXPECT_EQ(must(parse(with_u64(in, field::l1_table_offset, 0))).l1_entries, 0U);
}

TEST(RefcountTable, HasOneClusterAtLeastAnd8MiBAtMost) {
    const std::uint64_t large_file = std::uint64_t{1} << 40;
    const auto verify = [&](std::uint32_t clusters) {
        const auto in = with_u32(header_v3(), field::refcount_table_clusters, clusters);
        return verified(verify_refcount_table, in, large_file);
    };
    EXPECT_TRUE(fails(verify(0), Errc::corrupt, {"header field refcount_table_clusters (byte 56): 0"}));
    EXPECT_TRUE(verify(128));
    EXPECT_TRUE(fails(verify(129), Errc::limit_exceeded, {"refcount_table_clusters (byte 56): 129 clusters"}));
    EXPECT_TRUE(fails(verify(0xffffffff), Errc::limit_exceeded, {"refcount_table_clusters (byte 56)"}));
}

TEST(RefcountTable, LiesInTheFile) {
    const auto verify = [](std::uint64_t at, std::uint64_t file_size = header_file_size) {
        return verified(verify_refcount_table, with_u64(header_v3(), field::refcount_table_offset, at), file_size);
    };
    EXPECT_TRUE(verify(header_file_size - 65536));
    EXPECT_TRUE(fails(verify(0), Errc::corrupt, {"header field refcount_table_offset (byte 48)"}));
    EXPECT_TRUE(fails(verify((2 << 20) + 8), Errc::corrupt,
                      {"header field refcount_table_offset (byte 48): 0x200008 is not a multiple"}));
    EXPECT_TRUE(fails(verify(header_file_size), Errc::corrupt,
                      {"header field refcount_table_offset (byte 48)", "past the end of the file"}));
    EXPECT_TRUE(fails(verify(std::uint64_t{1} << 56, all_ones), Errc::corrupt,
                      {"header field refcount_table_offset (byte 48)", "more than the format can address"}));
}

TEST(SnapshotTable, HasAtMost65536Entries) {
    const auto verify = [](std::uint32_t count) {
        const auto in = with_u64(header_v3(), field::snapshots_offset, 6 << 20);
        return verified(verify_snapshot_table, with_u32(in, field::nb_snapshots, count), std::uint64_t{1} << 40);
    };
    EXPECT_TRUE(verify(65536));
    EXPECT_TRUE(fails(verify(65537), Errc::limit_exceeded, {"header field nb_snapshots (byte 60): 65537"}));
    EXPECT_TRUE(fails(verify(0xffffffff), Errc::limit_exceeded, {"header field nb_snapshots (byte 60)"}));
}

TEST(SnapshotTable, LiesInTheFile) {
    const auto in = with_u32(header_v3(), field::nb_snapshots, 2);
    const auto with_offset = [&](std::uint64_t at) { return with_u64(in, field::snapshots_offset, at); };
    const auto verify = [&](std::uint64_t at, std::uint64_t file_size = header_file_size) {
        return verified(verify_snapshot_table, with_offset(at), file_size);
    };
    const auto h = must(parse(with_offset(6 << 20)));
    EXPECT_EQ(h.snapshot_count, 2U);
    EXPECT_EQ(h.snapshot_table, HostOffset{6 << 20});
    EXPECT_TRUE(fails(verify(0), Errc::corrupt, {"header field snapshots_offset (byte 64)"}));
    EXPECT_TRUE(fails(verify((6 << 20) + 1), Errc::corrupt,
                      {"header field snapshots_offset (byte 64): 0x600001 is not a multiple"}));
    EXPECT_TRUE(fails(verify(header_file_size), Errc::corrupt,
                      {"header field snapshots_offset (byte 64)", "past the end of the file"}));
    // Two entries of at least 40 bytes each.
    EXPECT_TRUE(verify(6 << 20, (6 << 20) + 80));
    EXPECT_TRUE(fails(verify(6 << 20, (6 << 20) + 79), Errc::corrupt, {"80 bytes at 0x600000"}));
}

// ---- Features of version 3 ----

TEST(Header, KnowsFiveIncompatibleFeatures) {
    const auto with_bits = [](std::uint64_t bits) { return with_u64(header_v3(), field::incompatible_features, bits); };
    EXPECT_TRUE(must(parse(with_bits(1))).has(incompatible::dirty));
    EXPECT_TRUE(must(parse(with_bits(2))).has(incompatible::corrupt));
    EXPECT_TRUE(must(parse(with_bits(4))).has(incompatible::external_data));
    EXPECT_TRUE(must(parse(with_u8(with_bits(8), field::compression_type, 1))).has(incompatible::compression_type));
    EXPECT_TRUE(must(parse(with_u64(with_bits(16), field::size, 0))).has(incompatible::extended_l2));
}

TEST(Header, RefusesUnknownIncompatibleFeatures) {
    const auto with_bits = [](std::uint64_t bits) { return with_u64(header_v3(), field::incompatible_features, bits); };
    EXPECT_TRUE(
        fails(parse(with_bits(1 << 5)), Errc::unsupported,
              {"header field incompatible_features (byte 72)", "features that this version does not know: bit 5"}));
    EXPECT_TRUE(fails(parse(with_bits(std::uint64_t{1} << 63)), Errc::unsupported, {"bit 63"}));
    EXPECT_TRUE(fails(parse(with_bits(1 | 1 << 6 | 1 << 7)), Errc::unsupported, {"does not know: bit 6, bit 7"}));
}

TEST(Header, NamesUnknownIncompatibleFeaturesFromTheImagesOwnTable) {
    const auto names = joined({
        feature_name(0, 5, "time travel"),
        feature_name(0, 0, "dirty bit"),
        feature_name(1, 6, "compatible, thus not this one"),
        feature_name(0, 6, "a name of as many bytes as there are: forty-si"),
    });
    const auto in = with(with_u64(header_v3(), field::incompatible_features, 1 | 1 << 5 | 1 << 6), extensions_v3,
                         extension(0x6803f857, names));
    EXPECT_TRUE(fails(parse(in), Errc::unsupported,
                      {"header field incompatible_features (byte 72)",
                       "does not know: time travel (bit 5), a name of as many bytes as there are: forty-si (bit 6)"}));
}

TEST(Header, UnknownCompatibleAndAutoclearFeaturesDoNotMatter) {
    auto in = with_u64(header_v3(), field::compatible_features, 1 | std::uint64_t{1} << 40);
    in = with_u64(in, field::autoclear_features, std::uint64_t{1} << 63);
    const auto h = must(parse(in));
    EXPECT_EQ(h.compatible, 1 | std::uint64_t{1} << 40);
    EXPECT_EQ(h.autoclear, std::uint64_t{1} << 63);
}

TEST(Header, ExtendedL2EntriesNeedClustersOf16KiB) {
    const auto in = with_u64(with_u64(header_v3(), field::incompatible_features, 1 << 4), field::size, 65536);
    EXPECT_TRUE(parse(with_u32(in, field::cluster_bits, 14)));
    EXPECT_TRUE(fails(parse(with_u32(in, field::cluster_bits, 13)), Errc::corrupt,
                      {"header field cluster_bits (byte 20): 13", "extended L2"}));
}

TEST(Header, AnExternalDataFileExcludesInternalSnapshots) {
    auto in = with_u64(header_v3(), field::incompatible_features, 1 << 2);
    in = with_u64(with_u32(in, field::nb_snapshots, 1), field::snapshots_offset, 6 << 20);
    EXPECT_TRUE(fails(parse(in), Errc::corrupt, {"header field nb_snapshots (byte 60)", "external data file"}));
}

TEST(Header, ARawExternalDataFileExcludesABackingFile) {
    auto in = with_u32(with_u64(header_v3(), field::backing_file_offset, 512), field::backing_file_size, 4);
    in = with_u64(with_u64(in, field::autoclear_features, 1 << 1), field::incompatible_features, 1 << 2);
    EXPECT_TRUE(fails(parse(in), Errc::corrupt, {"header field backing_file_offset (byte 8)", "raw external data"}));
    // Either of them alone is fine.
    EXPECT_TRUE(parse(with_u64(in, field::autoclear_features, 0)));
    EXPECT_TRUE(parse(with_u64(in, field::backing_file_offset, 0)));
}

TEST(Header, RefcountOrderIsFrom0To6) {
    const auto with_order = [](std::uint32_t order) { return with_u32(header_v3(), field::refcount_order, order); };
    EXPECT_EQ(must(parse(with_order(0))).refcount_order, 0U);
    EXPECT_EQ(must(parse(with_order(6))).refcount_order, 6U);
    EXPECT_TRUE(fails(parse(with_order(7)), Errc::corrupt, {"header field refcount_order (byte 96): 7"}));
    EXPECT_TRUE(fails(parse(with_order(0xffffffff)), Errc::corrupt, {"header field refcount_order (byte 96)"}));
}

TEST(Header, HeaderLengthIsAMultipleOf8From104ToTheClusterSize) {
    const auto with_length = [](std::uint32_t length) { return with_u32(header_v3(), field::header_length, length); };
    EXPECT_EQ(must(parse(with_length(104))).header_length, 104U);
    EXPECT_EQ(must(parse(with_length(65536))).header_length, 65536U);
    EXPECT_TRUE(fails(parse(with_length(0)), Errc::corrupt, {"header field header_length (byte 100): 0"}));
    EXPECT_TRUE(fails(parse(with_length(96)), Errc::corrupt, {"header field header_length (byte 100): 96"}));
    EXPECT_TRUE(fails(parse(with_length(108)), Errc::corrupt, {"header field header_length (byte 100): 108"}));
    EXPECT_TRUE(fails(parse(with_length(65544)), Errc::corrupt, {"header field header_length (byte 100): 65544"}));
    EXPECT_TRUE(fails(parse(with_length(0xfffffff8)), Errc::corrupt, {"header field header_length (byte 100)"}));
}

TEST(Header, SkipsFieldsThatItDoesNotKnow) {
    // Eight bytes that a later version of the format gave a meaning, and the extensions after them.
    auto in = with_u64(with_u32(header_v3(), field::header_length, 120), 112, all_ones);
    in = with(in, 120, extension(0xe2792aca, text_bytes("qcow2")));
    EXPECT_EQ(must(parse(in)).backing_format, "qcow2");
}

TEST(Header, CompressionTypeGoesWithItsFeatureBit) {
    const auto zstd = with_u8(with_u64(header_v3(), field::incompatible_features, 1 << 3), field::compression_type, 1);
    EXPECT_EQ(must(parse(zstd)).compression, Compression::zstd);
    EXPECT_TRUE(fails(parse(with_u64(zstd, field::incompatible_features, 0)), Errc::corrupt,
                      {"header field compression_type (byte 104)", "feature bit"}));
    EXPECT_TRUE(fails(parse(with_u8(zstd, field::compression_type, 0)), Errc::corrupt,
                      {"header field compression_type (byte 104)", "feature bit"}));
    EXPECT_TRUE(fails(parse(with_u8(zstd, field::compression_type, 2)), Errc::unsupported,
                      {"header field compression_type (byte 104): 2"}));
}

TEST(Header, CompressionTypeIsZlibWhereTheHeaderEndsBeforeIt) {
    // Byte 104 is that of the first extension then.
    const auto in = with(with_u32(header_v3(), field::header_length, 104), 104, extension(0x01020304, u64(7)));
    const auto h = must(parse(in));
    EXPECT_EQ(h.compression, Compression::zlib);
    EXPECT_THAT(h.unknown_extensions, SizeIs(1));
    EXPECT_TRUE(fails(parse(with_u64(in, field::incompatible_features, 1 << 3)), Errc::corrupt,
                      {"header field compression_type (byte 104)", "feature bit"}));
}

// ---- Extensions ----

Bytes with_extensions(std::initializer_list<Bytes> extensions) {
    return with(header_v3(), extensions_v3, joined(extensions));
}

TEST(HeaderExtensions, BackingFormat) {
    EXPECT_EQ(must(parse(header_v3())).backing_format, std::nullopt);
    EXPECT_EQ(must(parse(with_extensions({extension(0xe2792aca, text_bytes("raw"))}))).backing_format, "raw");
    // An empty one says nothing.
    EXPECT_EQ(must(parse(with_extensions({extension(0xe2792aca, {})}))).backing_format, std::nullopt);
}

TEST(HeaderExtensions, DataFileName) {
    EXPECT_EQ(must(parse(header_v3())).data_file_name, std::nullopt);
    EXPECT_EQ(must(parse(with_extensions({extension(0x44415441, text_bytes("disk.raw"))}))).data_file_name, "disk.raw");
}

TEST(HeaderExtensions, FeatureNames) {
    const auto names = joined({feature_name(0, 0, "dirty bit"), feature_name(2, 63, "")});
    const auto h = must(parse(with_extensions({extension(0x6803f857, names)})));
    ASSERT_THAT(h.feature_names, SizeIs(2));
    EXPECT_EQ(h.feature_names[0].kind, 0);
    EXPECT_EQ(h.feature_names[0].bit, 0);
    EXPECT_EQ(h.feature_names[0].name, "dirty bit");
    EXPECT_EQ(h.feature_names[1].kind, 2);
    EXPECT_EQ(h.feature_names[1].bit, 63);
    EXPECT_EQ(h.feature_names[1].name, "");
}

TEST(HeaderExtensions, FeatureNamesEndWithTheLastWholeEntry) {
    const auto names = joined({feature_name(0, 0, "dirty bit"), repeated(47, 'x')});
    EXPECT_THAT(must(parse(with_extensions({extension(0x6803f857, names)}))).feature_names, SizeIs(1));
}

TEST(HeaderExtensions, Bitmaps) {
    const auto data = joined({u32(3), u32(0), u64(0x120), u64(0x70000)});
    const auto in = with_extensions({extension(0x23852875, data)});
    const auto h = must(parse(with_u64(in, field::autoclear_features, 1)));
    ASSERT_TRUE(h.bitmaps);
    EXPECT_EQ(h.bitmaps->count, 3U);
    EXPECT_EQ(h.bitmaps->directory_size, 0x120U);
    EXPECT_EQ(h.bitmaps->directory, HostOffset{0x70000});
    EXPECT_TRUE(h.bitmaps_consistent());
    // A writer that does not know bitmaps has cleared the bit.
    const auto inconsistent = must(parse(in));
    EXPECT_FALSE(inconsistent.bitmaps_consistent());
}

TEST(HeaderExtensions, BitmapsHave24Bytes) {
    EXPECT_TRUE(fails(parse(with_extensions({extension(0x23852875, repeated(23, 0))})), Errc::corrupt,
                      {"header extension bitmaps (byte 112): 23 bytes instead of 24"}));
    EXPECT_TRUE(fails(parse(with_extensions({extension(0x23852875, repeated(25, 0))})), Errc::corrupt,
                      {"header extension bitmaps (byte 112): 25 bytes"}));
}

TEST(HeaderExtensions, EncryptionHas16Bytes) {
    EXPECT_TRUE(fails(parse(with_extensions({extension(0x0537be77, repeated(15, 0))})), Errc::corrupt,
                      {"header extension encryption (byte 112): 15 bytes instead of 16"}));
    EXPECT_TRUE(fails(parse(with_extensions({extension(0x0537be77, repeated(17, 0))})), Errc::corrupt,
                      {"header extension encryption (byte 112): 17 bytes"}));
}

TEST(HeaderExtensions, UnknownOnesAreListedInTheirOrder) {
    const auto h = must(parse(with_extensions({
        extension(0xffffffff, text_bytes("twelve bytes")),
        extension(0xe2792aca, text_bytes("raw")),
        extension(0x00000001, {}),
    })));
    ASSERT_THAT(h.unknown_extensions, SizeIs(2));
    EXPECT_EQ(h.unknown_extensions[0].type, 0xffffffffU);
    EXPECT_EQ(h.unknown_extensions[0].bytes, 12U);
    EXPECT_EQ(h.unknown_extensions[1].type, 1U);
    EXPECT_EQ(h.unknown_extensions[1].bytes, 0U);
    EXPECT_EQ(h.backing_format, "raw");
}

TEST(HeaderExtensions, ArePaddedTo8Bytes) {
    const auto h = must(parse(with_extensions({
        extension(0x11111111, repeated(8, 0xaa)),
        extension(0x22222222, repeated(9, 0xbb)),
        extension(0x33333333, repeated(7, 0xcc)),
        extension(0x44444444, {}),
    })));
    ASSERT_THAT(h.unknown_extensions, SizeIs(4));
    EXPECT_EQ(h.unknown_extensions[1].bytes, 9U);
    EXPECT_EQ(h.unknown_extensions[2].bytes, 7U);
    EXPECT_EQ(h.unknown_extensions[3].type, 0x44444444U);
}

TEST(HeaderExtensions, ThereAreAtMostAThousand) {
    Bytes all;
    for (std::size_t i = 0; i < max_extensions; ++i) all = joined({std::move(all), extension(0x11111111, u64(i))});
    EXPECT_THAT(must(parse(with_extensions({all}))).unknown_extensions, SizeIs(max_extensions));
    EXPECT_TRUE(fails(parse(with_extensions({all, extension(0x22222222, {})})), Errc::limit_exceeded,
                      {"header extension 0x22222222 (byte 16112)", "more than 1000"}));
}

TEST(HeaderExtensions, NamesHaveLimits) {
    EXPECT_TRUE(must(parse(with_extensions({extension(0x44415441, repeated(4096, 'x'))}))).data_file_name);
    EXPECT_TRUE(fails(parse(with_extensions({extension(0x44415441, repeated(4097, 'x'))})), Errc::limit_exceeded,
                      {"header extension data file name (byte 112)", "4097"}));
    Bytes names;
    for (int i = 0; i < 200; ++i) names = joined({std::move(names), feature_name(0, 63, "again")});
    EXPECT_THAT(
        must(parse(with_extensions({extension(0x6803f857, names), extension(0x6803f857, names)}))).feature_names,
        SizeIs(192));
}

TEST(HeaderExtensions, EndWithType0) {
    const auto ended = [](std::uint32_t length) {
        return parse(with_extensions({extension(0x11111111, {}), u32(0), u32(length), extension(0x22222222, {})}));
    };
    // The end begins at byte 120. Its length has no meaning, but QEMU refuses one that the first cluster cannot hold.
    for (const std::uint32_t length : {0, 100, 65536 - 128})
        EXPECT_THAT(must(ended(length)).unknown_extensions, SizeIs(1));
    for (const std::uint32_t length : {65536U - 127, 0xffffffffU})
        EXPECT_TRUE(fails(ended(length), Errc::corrupt, {"header extension 0x00000000 (byte 120)", "past the space"}));
}

TEST(HeaderExtensions, EndWhereTheBackingFileNameBegins) {
    // No end marker; and the name does not begin at a multiple of 8, so that the padding is cut short.
    auto in = with_extensions({extension(0x11111111, repeated(5, 0xaa))});
    in = with(in, 112 + 13, text_bytes("base"));
    in = with_u32(with_u64(in, field::backing_file_offset, 112 + 13), field::backing_file_size, 4);
    const auto h = must(parse(in));
    EXPECT_THAT(h.unknown_extensions, SizeIs(1));
    EXPECT_EQ(h.backing_name, "base");
}

TEST(HeaderExtensions, HaveNoSpaceForLessThanOne) {
    // Of the 8 bytes that one begins with, the name of the backing file would be a part.
    for (const std::size_t bytes : {0, 1, 4, 7, 8}) {
        auto in = with_u64(header_v3(), field::backing_file_offset, 112 + bytes);
        in = with_u32(with(in, 112 + bytes, text_bytes("base")), field::backing_file_size, 4);
        const auto parsed = parse(in);
        if (bytes == 0 || bytes == 8) {
            EXPECT_EQ(must(parsed).backing_name, "base");
        } else {
            EXPECT_TRUE(fails(parsed, Errc::corrupt, {"header extension", "past the space for extensions"})) << bytes;
        }
    }
}

TEST(HeaderExtensions, EndWithTheFirstCluster) {
    const auto in = with_extensions({extension(0x11111111, repeated(65536 - 112 - 8, 0xaa))});
    EXPECT_EQ(must(parse(in)).unknown_extensions.at(0).bytes, 65416U);
}

TEST(HeaderExtensions, DoNotReachPastTheFirstCluster) {
    const auto with_length = [](std::uint32_t length) {
        return with_extensions({extension(0xe2792aca, text_bytes("raw")), u32(0x11223344), u32(length)});
    };
    // The second extension's data begin at byte 136.
    EXPECT_TRUE(parse(with_length(65536 - 136)));
    EXPECT_TRUE(fails(parse(with_length(65536 - 136 + 1)), Errc::corrupt,
                      {"header extension 0x11223344 (byte 128)", "65401 bytes", "byte 65536"}));
    EXPECT_TRUE(fails(parse(with_length(0xffffffff)), Errc::corrupt, {"header extension 0x11223344 (byte 128)"}));
}

TEST(HeaderExtensions, DoNotReachIntoTheBackingFileName) {
    auto in = with_extensions({extension(0x11111111, repeated(16, 0xaa))});
    in = with_u32(in, field::backing_file_size, 4);
    EXPECT_TRUE(parse(with_u64(in, field::backing_file_offset, 112 + 24)));
    EXPECT_TRUE(fails(parse(with_u64(in, field::backing_file_offset, 112 + 23)), Errc::corrupt,
                      {"header extension 0x11111111 (byte 112)", "byte 135"}));
}

// ---- Features by name ----

TEST(Features, AreListedByKindAndBit) {
    Header h;
    h.incompatible = 0b11111;
    h.compatible = 1;
    h.autoclear = 3;
    std::vector<std::string> names;
    for (const auto& feature : features_of(h, h)) {
        EXPECT_TRUE(feature.known);
        names.push_back(feature.name);
    }
    EXPECT_THAT(names, ElementsAre("dirty", "corrupt", "external data file", "compression type", "extended L2 entries",
                                   "lazy refcounts", "bitmaps", "raw external data"));
}

TEST(Features, OfKindsAreToldApart) {
    Header h;
    h.compatible = 1 << 1;
    h.autoclear = 1 << 2;
    h.feature_names = {{1, 1, "mine"}, {2, 1, "not this"}};
    const auto features = features_of(h, h);
    ASSERT_THAT(features, SizeIs(2));
    EXPECT_EQ(features[0].kind, Feature::Kind::compatible);
    EXPECT_EQ(features[0].bit, 1U);
    EXPECT_EQ(features[0].name, "mine (bit 1)");
    EXPECT_FALSE(features[0].known);
    EXPECT_EQ(features[1].kind, Feature::Kind::autoclear);
    EXPECT_EQ(features[1].name, "bit 2");
}

TEST(Features, KnownOnesKeepTheirNameWhateverTheImageCallsThem) {
    Header h;
    h.incompatible = 2;
    h.feature_names = {{0, 1, "perfectly fine"}};
    EXPECT_EQ(features_of(h, h).at(0).name, "corrupt");
}

TEST(Features, NoneAreListedWhereNoBitIsSet) { EXPECT_THAT(features_of({}, {}), IsEmpty()); }

}  // namespace
}  // namespace qcow::format
