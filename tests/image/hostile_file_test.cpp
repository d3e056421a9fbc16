// Files that are no images, are cut off, or claim to be huge.

#include <sys/stat.h>

#include <filesystem>

#include "fuzz/image_builder.h"
#include "hostile.h"

namespace qcow::hostile {
namespace {

// What is not an image at all.

TEST_F(Hostile, ThingsThatAreNoFiles) {
    ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
    std::filesystem::create_directory(path("directory"));
    std::filesystem::create_symlink("loop", path("loop"));
    expect_error(open_file(path("fifo")), Errc::invalid_argument, {"fifo"});
    expect_error(open_file(path("directory")), Errc::invalid_argument, {"directory"});
    expect_error(open_file("/dev/null"), Errc::invalid_argument, {"/dev/null"});
    expect_error(open_file("/dev/zero"), Errc::invalid_argument, {"/dev/zero"});
    expect_error(open_file(path("missing")), Errc::not_found, {"missing"});
    expect_error(open_file(path("missing\n\x1b[31m")), Errc::not_found, {"missing\\x0a\\x1b"});
    expect_error(open_file(path("loop")), Errc::io, {"loop"});
}

TEST_F(Hostile, EmptyFile) {
    const auto empty = memory_storage({}, "empty");
    expect_error(open_image(empty, options_for(Format::qcow2)), Errc::corrupt, {"empty: header", "0 bytes"});
    expect_error(open_image(empty, options_for(Format::qcow)), Errc::corrupt, {"empty: header", "0 bytes"});
    const auto raw = open_image(empty);
    ASSERT_TRUE(raw.has_value());
    EXPECT_EQ((*raw)->size(), 0U);
    EXPECT_TRUE((*raw)->read({0}, {}).has_value());
}

TEST_F(Hostile, WrongMagic) {
    const auto text = memory_storage(Bytes(4096, std::byte{'Q'}), "text");
    expect_error(open_image(text, options_for(Format::qcow2)), Errc::corrupt, {"magic (byte 0)"});
    expect_error(open_image(text, options_for(Format::qcow)), Errc::corrupt, {"magic (byte 0)"});
    EXPECT_EQ((*open_image(text))->format(), Format::raw);
}

TEST_F(Hostile, UnknownVersionsAndFeatures) {
    HostileImage image;
    image.version = 4;
    expect_error(open_bounded(image.finish()), Errc::unsupported, {"version (byte 4)"});
    HostileImage features;
    features.incompatible = bit(63) | bit(5);
    expect_error(open_bounded(features.finish()), Errc::unsupported, {"byte 72", "bit 5", "bit 63"});
}

/// Cut off anywhere, an image is refused or reads as what it was; only the tail of its last cluster may be missing.
TEST_F(Hostile, TruncatedAtEveryLength) {
    for (const std::uint64_t seed : {3U, 11U, 12U, 29U}) {
        fuzz::Random random(seed);
        auto file = fuzz::build_image(random).front();
        if (file.size() > 64 * KiB) continue;
        const auto whole = open_image(fuzz::storage_of(file, "whole"));
        if (!whole || (*whole)->size() > MiB) continue;
        Bytes expected((*whole)->size());
        ASSERT_TRUE((*whole)->read({0}, expected).has_value());
        const std::uint64_t step = (file.size() > 16 * KiB ? 7 : 1) * (test::sanitized ? 20 : 1);
        for (std::uint64_t length = 0; length < file.size(); length += step) {
            auto cut = file;
            cut.fixed_size = length;
            const auto image = open_image(fuzz::storage_of(cut, "cut"), options_for((*whole)->format()));
            if (!image) {
                expect_good_message(image.error());
                continue;
            }
            Bytes bytes(expected.size());
            const auto read = (*image)->read({0}, bytes);
            if (!read) {
                expect_good_message(read.error());
            } else {
                for (std::size_t i = 0; i < bytes.size(); ++i)
                    ASSERT_TRUE(bytes[i] == expected[i] || bytes[i] == std::byte{0}) << length << ", byte " << i;
            }
            const auto report = (*image)->check({.workers = 1});
            if (!report) expect_good_message(report.error());
        }
    }
}

// Numbers that are too large.

TEST_F(Hostile, LongestL1Table) {
    HostileImage image;
    image.l1_entries = 0xffff'ffff;
    expect_error(open_bounded(image.finish()), Errc::limit_exceeded, {"l1_size (byte 36)", "4294967295"});
}

TEST_F(Hostile, LargestVirtualSizes) {
    for (const std::uint64_t size : {bit(63), bit(63) - 1, ~std::uint64_t{0}, bit(62) + 1}) {
        for (const unsigned bits : {9U, 16U, 21U}) {
            HostileImage image(bits);
            image.size = size;
            image.l1_entries = static_cast<std::uint32_t>(format::max_l1_bytes / 8);
            auto file = image.finish();
            file.fixed_size = bit(40);
            expect_error(open_bounded(std::move(file)), Errc::corrupt, {"byte 36"});
        }
    }
}

TEST_F(Hostile, TablesThatDoNotLieInTheFile) {
    HostileImage l1;
    l1.l1_table = bit(40);
    expect_error(open_bounded(l1.finish()), Errc::corrupt, {"l1_table_offset (byte 40)", "0x100000000000000"});
    HostileImage in_header;
    in_header.l1_table = 0;
    expect_error(open_bounded(in_header.finish()), Errc::corrupt, {"l1_table_offset (byte 40)"});
}

/// They are read all the same, as no read needs these tables; nothing is written, and a check names them.
TEST_F(Hostile, TablesThatReadingDoesNotNeed) {
    const auto expect_only_read = [](HostileImage image, Errc code, const std::string& place) {
        auto file = image.finish();
        const auto opened = open_bounded(file);
        ASSERT_TRUE(opened.has_value()) << opened.error().message();
        Bytes bytes(MiB);
        EXPECT_TRUE((*opened)->read({0}, bytes).has_value());
        EXPECT_TRUE((*opened)->extent({0}, MiB).has_value());
        EXPECT_TRUE(info_bounded(**opened).has_value());
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_THAT(report->findings,
                    testing::Contains(testing::Field(&CheckFinding::place, testing::HasSubstr(place))));
        expect_error(open_for_writing_bounded(fuzz::storage_of(std::move(file), "hostile.qcow2")), code, {place});
    };
    for (const std::uint64_t table : {bit(16), bit(24), bit(40), bit(47), std::uint64_t{0}}) {
        HostileImage image;
        image.refcount_table = table;
        expect_only_read(std::move(image), Errc::corrupt, "refcount_table_offset (byte 48)");
    }
    HostileImage most;
    most.refcount_table_clusters = 0xffff'ffff;
    expect_only_read(std::move(most), Errc::limit_exceeded, "refcount_table_clusters (byte 56)");
    HostileImage none;
    none.refcount_table_clusters = 0;
    expect_only_read(std::move(none), Errc::corrupt, "refcount_table_clusters (byte 56)");
    HostileImage snapshots;
    snapshots.snapshots = 0xffff'ffff;
    expect_only_read(std::move(snapshots), Errc::limit_exceeded, "nb_snapshots (byte 60)");
    HostileImage past_the_end;
    past_the_end.snapshots = 1;
    past_the_end.snapshot_table = 100;
    expect_only_read(std::move(past_the_end), Errc::corrupt, "snapshots_offset (byte 64)");
}

/// A file of 2^62 bytes, nearly all of it a hole, with tables in the hole and at the far end of what can be addressed.
TEST_F(Hostile, HugeSparseFile) {
    for (const std::uint64_t l1_table : {std::uint64_t{3}, bit(40) - 1, bit(39), bit(40)}) {
        HostileImage image;
        image.size = bit(50);
        image.l1_entries = bit(21);
        image.l1_table = l1_table;
        image.refcount_table = bit(38);
        image.refcount_table_clusters = 128;
        image.snapshots = 65536;
        image.snapshot_table = bit(37);
        auto file = image.finish();
        file.fixed_size = bit(62);
        const auto opened = open_bounded(std::move(file));
        if (!opened) continue;
        EXPECT_FALSE(whole_info_bounded(**opened).has_value());  // zeros are no snapshots in version 3
        std::byte last = {};
        const auto read = (*opened)->read({image.size - 1}, {&last, 1});
        if (!read) expect_good_message(read.error());
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
        expect_error(check_bounded(**opened, 16 * KiB), Errc::limit_exceeded, {"check", "more than the 16 KiB"});
    }
}

TEST_F(Hostile, ManyUnknownExtensions) {
    HostileImage image(21);
    for (unsigned i = 0; i < 120'000; ++i) image.extensions.push_back({0x1000'0000 + i, Bytes(8)});
    expect_error(open_bounded(image.finish()), Errc::limit_exceeded, {"header extension 0x1", "more than 1000"});
    image.extensions.resize(1000);
    const auto opened = open_bounded(image.finish());
    ASSERT_TRUE(opened.has_value());
    EXPECT_TRUE(info_bounded(**opened).has_value());
}

/// What is not understood takes no memory, or a chain of 256 layers would take much.
TEST_F(Hostile, LargeUnknownExtensions) {
    HostileImage image(21);
    image.extensions.push_back({0x1000'0000, Bytes(MiB)});
    image.extensions.push_back({0x6803'f857, Bytes(MiB - 64 * KiB)});  // the names of 20,000 features
    const auto storage = fuzz::storage_of(image.finish(), "hostile.qcow2");
    std::vector<std::shared_ptr<Image>> layers;
    const auto cost = cost_of([&] {
        for (int i = 0; i < 256; ++i) {
            auto opened = open_image(storage, options_for(Format::qcow2));
            ASSERT_TRUE(opened.has_value()) << opened.error().message();
            layers.push_back(*std::move(opened));
        }
    });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, max_open_bytes);
}

}  // namespace
}  // namespace qcow::hostile
