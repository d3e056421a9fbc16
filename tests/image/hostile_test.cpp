// Files that mean harm: each is refused, or handled within small bounds of time and memory, with an error that says on
// one line what is wrong and where.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>

#include "codec/codec.h"
#include "fuzz/image_builder.h"
#include "hostile_image.h"
#include "qcow/copy.h"
#include "qcow/image.h"

namespace qcow::hostile {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr double slowness = 8;
constexpr std::size_t fatness = 8;
#else
constexpr double slowness = 1;
constexpr std::size_t fatness = 1;
#endif
constexpr double max_seconds = 2 * slowness;
constexpr std::size_t max_open_bytes = 64 * MiB * fatness;

/// A line of /proc/self/status, in bytes.
std::size_t memory_status(const std::string& name) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.starts_with(name + ":")) return std::stoull(line.substr(name.size() + 1)) * KiB;
    }
    return 0;
}

/// What `work` takes: seconds of a processor, so that a busy machine does not matter, and memory at its worst beyond
/// what there was before.
struct Cost {
    double seconds = 0;
    std::size_t bytes = 0;
};
Cost cost_of(const std::function<void()>& work) {
    std::ofstream("/proc/self/clear_refs") << "5";  // forgets the peak so far
    const auto before = memory_status("VmRSS");
    const std::clock_t begin = std::clock();
    work();
    Cost cost;
    cost.seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    const auto peak = memory_status("VmHWM");
    cost.bytes = peak > before ? peak - before : 0;
    return cost;
}

void expect_good_message(const Error& error) {
    const auto message = error.message();
    EXPECT_FALSE(error.what.empty());
    EXPECT_LT(message.size(), 10'000U);
    for (const char c : message) ASSERT_TRUE(static_cast<unsigned char>(c) >= 0x20 && c != 0x7f) << message;
}

template <class T>
void expect_error(const Result<T>& result, Errc code, const std::vector<std::string>& fragments = {}) {
    ASSERT_FALSE(result.has_value());
    expect_good_message(result.error());
    EXPECT_EQ(static_cast<int>(result.error().code), static_cast<int>(code)) << result.error().message();
    for (const auto& fragment : fragments) EXPECT_THAT(result.error().message(), HasSubstr(fragment));
}

OpenOptions options_for(std::optional<Format> format, Gate gate = no_files()) {
    OpenOptions options;
    options.format = format;
    options.gate = std::move(gate);
    return options;
}

/// Opens within the bounds that hold for every image.
Result<std::shared_ptr<Image>> open_bounded(std::shared_ptr<Storage> storage, Gate gate = no_files()) {
    Result<std::shared_ptr<Image>> result;
    const auto cost = cost_of([&] { result = open_image(std::move(storage), options_for(Format::qcow2, gate)); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, max_open_bytes);
    if (!result) expect_good_message(result.error());
    return result;
}

Result<std::shared_ptr<Image>> open_bounded(fuzz::SparseFile file) {
    return open_bounded(fuzz::storage_of(std::move(file), "hostile.qcow2"));
}

/// A check within the bounds; `budget` is what it may use, which the memory it really takes must not exceed by much.
Result<CheckReport> check_bounded(Image& image, std::size_t budget = 512 * MiB) {
    Result<CheckReport> result;
    CheckOptions options;
    options.workers = 2;
    options.max_findings = 100;
    options.memory_bytes = budget;
    const auto cost = cost_of([&] { result = image.check(options); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, (budget + 64 * MiB) * fatness);
    if (!result) expect_good_message(result.error());
    return result;
}

Result<ImageInfo> info_bounded(const Image& image) {
    Result<ImageInfo> result;
    const auto cost = cost_of([&] { result = image.info(); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, 128 * MiB * fatness);
    if (!result) expect_good_message(result.error());
    return result;
}

class Hostile : public ::testing::Test {
protected:
    Hostile() {
        std::string name = std::filesystem::temp_directory_path() / "hostile-XXXXXX";
        dir_ = ::mkdtemp(name.data());
    }
    ~Hostile() override { std::filesystem::remove_all(dir_); }

    [[nodiscard]] std::string path(const std::string& name) const { return dir_ / name; }

    /// The file as a real one, with holes.
    std::string write(const std::string& name, const fuzz::SparseFile& file) const {
        const auto target = path(name);
        const int fd = ::open(target.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        EXPECT_GE(fd, 0);
        for (const auto& segment : file.segments) {
            EXPECT_EQ(::pwrite(fd, segment.bytes.data(), segment.bytes.size(), static_cast<off_t>(segment.offset)),
                      static_cast<ssize_t>(segment.bytes.size()));
        }
        EXPECT_EQ(::ftruncate(fd, static_cast<off_t>(file.size())), 0);
        ::close(fd);
        return target;
    }

    std::shared_ptr<Storage> open(const std::string& name) const {
        auto opened = open_file(path(name));
        EXPECT_TRUE(opened.has_value()) << opened.error().message();
        return opened ? *opened : nullptr;
    }

    /// An image that holds nothing but the name of another one.
    static fuzz::SparseFile overlay(const std::string& backing, std::string_view format = "qcow2") {
        HostileImage image(9);
        image.size = 4096;
        image.backing_name = backing;
        if (!format.empty()) image.set_backing_format(format);
        return image.finish();
    }

    std::filesystem::path dir_;
};

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
        const std::uint64_t step = file.size() > 16 * KiB ? 7 : 1;
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
    HostileImage refcounts;
    refcounts.refcount_table_clusters = 0xffff'ffff;
    expect_error(open_bounded(refcounts.finish()), Errc::limit_exceeded, {"refcount_table_clusters (byte 56)"});
    HostileImage none;
    none.refcount_table_clusters = 0;
    expect_error(open_bounded(none.finish()), Errc::corrupt, {"refcount_table_clusters (byte 56)"});
    HostileImage snapshots;
    snapshots.snapshots = 0xffff'ffff;
    expect_error(open_bounded(snapshots.finish()), Errc::limit_exceeded, {"nb_snapshots (byte 60)"});
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
        EXPECT_FALSE(info_bounded(**opened).has_value());  // zeros are no snapshots in version 3
        std::byte last = {};
        const auto read = (*opened)->read({image.size - 1}, {&last, 1});
        if (!read) expect_good_message(read.error());
        expect_error(check_bounded(**opened), Errc::limit_exceeded, {"check"});
    }
}

TEST_F(Hostile, ManyUnknownExtensions) {
    HostileImage image(21);
    for (unsigned i = 0; i < 120'000; ++i) image.extensions.push_back({0x1000'0000 + i, Bytes(8)});
    const auto opened = open_bounded(image.finish());
    ASSERT_TRUE(opened.has_value());
    EXPECT_TRUE(info_bounded(**opened).has_value());
}

// Small files that multiply.

TEST_F(Hostile, AMillionEntriesForOneCluster) {
    HostileImage image;
    image.size = bit(36);
    image.l1_entries = 128;
    image.write_refcounts(6 + 128);
    for (std::uint64_t i = 0; i < 128; ++i) {
        image.file.write_word(image.cluster(3) + i * 8, image.cluster(6 + i) | format::copied_bit);
        image.fill(image.cluster(6 + i), 8192, image.cluster(5) | format::copied_bit);
    }
    write("image", image.finish(6 + 128));
    const auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    const auto report = check_bounded(**opened);
    ASSERT_TRUE(report.has_value());
    EXPECT_GT(report->corruptions, 0U);
    EXPECT_LE(report->findings.size(), 100U);
    const auto cost = cost_of([&] { EXPECT_TRUE(measure_usage(**opened).has_value()); });
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, 64 * MiB * fatness);
}

TEST_F(Hostile, FourMillionL1EntriesForOneL2Table) {
    HostileImage image;
    image.size = bit(51);
    image.l1_entries = bit(22);
    image.write_refcounts(4 + 512 + 2);
    image.fill(image.cluster(3), bit(22), image.cluster(600));
    image.fill(image.cluster(600), 8192, image.cluster(601));
    write("image", image.finish(602));
    const auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    EXPECT_TRUE(info_bounded(**opened).has_value());
    const auto report = check_bounded(**opened);
    EXPECT_TRUE(!report || report->corruptions > 0);
    Bytes bytes(MiB);
    EXPECT_TRUE((*opened)->read({bit(50)}, bytes).has_value());
}

TEST_F(Hostile, RefcountTableThatNamesOneBlock) {
    for (const std::uint64_t block : {2U, 1U, 3U, 200U}) {
        HostileImage image;
        image.refcount_table = 8;
        image.refcount_table_clusters = 128;
        image.fill(image.cluster(8), bit(20), image.cluster(block));
        image.fill(image.cluster(2), 8192, 0x0001000100010001);
        write("image", image.finish(201));
        const auto opened = open_bounded(open("image"));
        ASSERT_TRUE(opened.has_value());
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

TEST_F(Hostile, RefcountBlocksThatAreOtherThings) {
    // The table itself, the L1 table, a place within a cluster, one past the end.
    for (const std::uint64_t at : {std::uint64_t{1} << 16, std::uint64_t{3} << 16, std::uint64_t{0x10200}, bit(60)}) {
        HostileImage image;
        image.file.write_word(image.cluster(1), at);
        const auto opened = open_bounded(image.finish());
        ASSERT_TRUE(opened.has_value());
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

/// Refcounts of one bit make a block of 2 MiB stand for 16 million clusters, and a block that is nearly a hole is
/// cheap to have.
TEST_F(Hostile, ManyLargeRefcountBlocks) {
    HostileImage image(21);
    image.refcount_order = 0;
    constexpr std::uint64_t blocks = 400;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        image.file.write_word(image.cluster(1) + i * 8, image.cluster(10 + i));
        image.file.segments.push_back({image.cluster(10 + i), Bytes(8, std::byte{0x01})});
    }
    write("image", image.finish(10 + blocks));
    const auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    const auto report = check_bounded(**opened);
    ASSERT_TRUE(report.has_value());
    EXPECT_FALSE(report->clean());
}

TEST_F(Hostile, L2TablesThatAreOtherThings) {
    // Within the header's cluster, the refcount table, the L1 table itself, the end of the file and past it.
    for (const std::uint64_t at : {std::uint64_t{0x200}, std::uint64_t{1} << 16, std::uint64_t{3} << 16,
                                   std::uint64_t{4} << 16, std::uint64_t{1} << 55}) {
        HostileImage image;
        image.write_refcounts(4);
        image.file.write_word(image.cluster(3), at | format::copied_bit);
        const auto opened = open_bounded(image.finish());
        ASSERT_TRUE(opened.has_value());
        std::byte first = {};
        const auto read = (*opened)->read({0}, {&first, 1});
        if (!read) {
            expect_error(read, Errc::corrupt, {"host offset 0x"});
        } else {
            EXPECT_THAT(at, AnyOf(image.cluster(1), image.cluster(3)));  // those whose first entry means something
        }
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

// Snapshots and bitmaps.

Bytes snapshot_entry(std::uint64_t l1_table, std::uint32_t l1_entries, std::uint64_t size, unsigned extra = 16) {
    Bytes entry;
    append(entry, l1_table, 8);
    append(entry, l1_entries, 4);
    append(entry, 1, 2);  // id
    append(entry, 1, 2);  // name
    entry.resize(36);
    append(entry, extra, 4);
    append(entry, 0, 8);
    append(entry, size, 8);
    append(entry, "1a");
    entry.resize((entry.size() + 7) / 8 * 8);
    return entry;
}

TEST_F(Hostile, SnapshotTablesWithoutEnd) {
    for (const unsigned extra : {0xffff'ffffU, 0x7fff'fff0U, 32U * 1024 * 1024, 15U}) {
        HostileImage image;
        image.snapshots = 65536;
        image.snapshot_table = 4;
        image.file.write(image.cluster(4), snapshot_entry(0, 0, 0, extra));
        image.file.fixed_size = bit(40);
        write("image", image.finish());
        const auto opened = open_bounded(open("image"));
        ASSERT_TRUE(opened.has_value());
        expect_error(info_bounded(**opened), Errc::corrupt, {"snapshot table entry", "host offset 0x"});
        expect_error((*opened)->snapshot("1"), Errc::corrupt, {"snapshot table entry", "host offset 0x"});
        EXPECT_TRUE(check_bounded(**opened).has_value());
    }
}

/// A file that somebody cuts short while it is read: it says that it has bytes that never come.
class ShortStorage final : public Storage {
public:
    ShortStorage(std::shared_ptr<Storage> storage, std::uint64_t claimed)
        : storage_(std::move(storage)), claimed_(claimed) {}
    [[nodiscard]] const std::string& name() const override { return storage_->name(); }
    [[nodiscard]] std::string identity() const override { return storage_->identity(); }
    [[nodiscard]] Result<std::uint64_t> size() const override { return claimed_; }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return storage_->allocated(); }
    Result<std::size_t> read(HostOffset at, std::span<std::byte> to) const override { return storage_->read(at, to); }
    Result<void> write(HostOffset at, std::span<const std::byte> from) override { return storage_->write(at, from); }
    Result<void> write_zeroes(HostOffset at, std::uint64_t n) override { return storage_->write_zeroes(at, n); }
    Result<void> resize(std::uint64_t size) override { return storage_->resize(size); }
    Result<void> flush() override { return storage_->flush(); }
    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        return storage_->run(at, limit);
    }

private:
    std::shared_ptr<Storage> storage_;
    std::uint64_t claimed_;
};

TEST_F(Hostile, FileThatIsCutShortMeanwhile) {
    HostileImage image;
    image.snapshots = 3;
    image.snapshot_table = 4;
    image.file.write(image.cluster(4), snapshot_entry(0, 0, 0, 0xffff'ffff));
    const auto storage = fuzz::storage_of(image.finish(6), "short");
    const auto opened = open_bounded(std::make_shared<ShortStorage>(storage, bit(40)));
    ASSERT_TRUE(opened.has_value());
    EXPECT_FALSE(info_bounded(**opened).has_value());
    EXPECT_TRUE(check_bounded(**opened).has_value());
}

TEST_F(Hostile, SnapshotTableInAHole) {
    HostileImage image;
    image.version = 2;  // in which an entry of zeros is a snapshot
    image.snapshots = 65536;
    image.snapshot_table = 16;
    image.file.fixed_size = bit(40);
    write("image", image.finish());
    const auto opened = open_bounded(open("image"));
    ASSERT_TRUE(opened.has_value());
    const auto info = info_bounded(**opened);
    ASSERT_TRUE(info.has_value());
    EXPECT_EQ(info->snapshots.size(), 65536U);
    EXPECT_TRUE(check_bounded(**opened).has_value());
}

TEST_F(Hostile, SnapshotTableOverOtherTables) {
    for (const std::uint64_t at : {0U, 1U, 2U, 3U}) {
        HostileImage image;
        image.write_refcounts(4);
        image.fill(image.cluster(3), 8192, ~std::uint64_t{0});
        image.snapshots = 65536;
        image.snapshot_table = at;
        image.file.fixed_size = bit(30);
        const auto opened = open_bounded(image.finish());
        if (!opened) continue;  // the header's cluster
        EXPECT_FALSE(info_bounded(**opened).has_value());
        EXPECT_TRUE(check_bounded(**opened).has_value());
    }
}

/// Each snapshot alone is sound; that all of them share one large L1 table makes them a bomb.
TEST_F(Hostile, SnapshotsThatShareOneL1Table) {
    // Entries that name an L2 table, and entries that are flawed.
    for (const std::uint64_t entry : {std::uint64_t{700} << 16, std::uint64_t{0x200}}) {
        HostileImage image;
        image.snapshots = 65536;
        image.snapshot_table = 1024;
        image.fill(image.cluster(8), bit(22), entry);
        Bytes table;
        for (unsigned i = 0; i < image.snapshots; ++i) {
            const auto one = snapshot_entry(image.cluster(8), bit(22), 0);
            table.insert(table.end(), one.begin(), one.end());
        }
        image.file.segments.push_back({image.cluster(1024), std::move(table)});
        image.file.fixed_size = bit(42);
        write("image", image.finish());
        const auto opened = open_bounded(open("image"));
        ASSERT_TRUE(opened.has_value());
        EXPECT_TRUE(info_bounded(**opened).has_value());
        const auto report = check_bounded(**opened);
        EXPECT_TRUE(!report || report->corruptions > 0);
    }
}

Bytes bitmap_entry(std::uint64_t table, std::uint32_t entries) {
    Bytes entry;
    append(entry, table, 8);
    append(entry, entries, 4);
    append(entry, 0, 4);
    append(entry, 1, 1);
    append(entry, 16, 1);
    append(entry, 1, 2);
    append(entry, 0, 4);
    append(entry, "b");
    entry.resize((entry.size() + 7) / 8 * 8);
    return entry;
}

Extension bitmaps_extension(std::uint32_t count, std::uint64_t bytes, std::uint64_t at) {
    Extension extension{0x23852875, {}};
    append(extension.data, count, 4);
    append(extension.data, 0, 4);
    append(extension.data, bytes, 8);
    append(extension.data, at, 8);
    return extension;
}

TEST_F(Hostile, BitmapsThatShareOneTable) {
    for (const std::uint32_t entries : {0xffff'ffffU, 0x0010'0000U}) {
        for (const unsigned bits : {9U, 16U}) {
            HostileImage image(bits);
            image.size = 4096;
            image.autoclear = 1;
            const std::uint64_t table_at = bit(24);
            image.fill(table_at, 4096, 1);
            Bytes directory;
            for (unsigned i = 0; i < 65535; ++i) {
                const auto one = bitmap_entry(table_at, entries);
                directory.insert(directory.end(), one.begin(), one.end());
            }
            image.extensions.push_back(bitmaps_extension(65535, directory.size(), bit(25)));
            image.file.segments.push_back({bit(25), std::move(directory)});
            image.file.fixed_size = bit(51);
            const auto opened = open_bounded(image.finish());
            ASSERT_TRUE(opened.has_value());
            const auto info = info_bounded(**opened);
            ASSERT_TRUE(info.has_value());
            EXPECT_EQ(info->bitmaps.size(), 65535U);
            check_bounded(**opened, 64 * MiB);
        }
    }
}

TEST_F(Hostile, BitmapDirectoriesThatLie) {
    struct Case {
        std::uint32_t count;
        std::uint64_t bytes;
        std::uint64_t at;
    };
    for (const auto& c : {Case{0, 32, 4 << 16}, Case{65536, 32, 4 << 16}, Case{1, ~std::uint64_t{0}, 4 << 16},
                          Case{1, 32, ~std::uint64_t{0xffff}}, Case{1, 32, 0x200}, Case{2, 32, 4 << 16},
                          Case{1, bit(30), 4 << 16}, Case{1, 64, 4 << 16}}) {
        HostileImage image;
        image.autoclear = 1;
        image.extensions.push_back(bitmaps_extension(c.count, c.bytes, c.at));
        image.file.write(image.cluster(4), bitmap_entry(image.cluster(5), 1));
        image.file.fixed_size = bit(32);
        const auto opened = open_bounded(image.finish());
        ASSERT_TRUE(opened.has_value());
        expect_error(info_bounded(**opened), Errc::corrupt, {"bitmap directory at host offset 0x"});
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

// Compressed clusters.

/// Four clusters of 64 KiB whose streams are all the same, but for what `damage` does to the third.
HostileImage compressed_image(const Bytes& stream, bool zstd, const std::function<void(HostileImage&)>& damage) {
    HostileImage image;
    image.zstd = zstd;
    image.size = 4 * 64 * KiB;
    image.file.write_word(image.cluster(3), image.cluster(4));
    const auto sectors = (stream.size() + 511) / 512;
    for (std::uint64_t i = 0; i < 4; ++i) {
        image.file.segments.push_back({image.cluster(5 + 2 * i), stream});
        image.file.write_word(image.cluster(4) + i * 8,
                              format::compressed_bit | (sectors - 1) << 54 | image.cluster(5 + 2 * i));
    }
    damage(image);
    return image;
}

Bytes text_cluster() {
    Bytes plain(64 * KiB);
    for (std::size_t i = 0; i < plain.size(); ++i)
        plain[i] = static_cast<std::byte>("compressible "[i % 13] + i / 4096);
    return plain;
}

Bytes deflated(const Bytes& plain) {
    z_stream stream = {};
    EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
    Bytes out(plain.size() + 1024);
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(plain.data()));
    stream.avail_in = static_cast<uInt>(plain.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

Bytes zstd_compressed(const Bytes& plain) {
    Bytes out(ZSTD_compressBound(plain.size()));
    out.resize(ZSTD_compress(out.data(), out.size(), plain.data(), plain.size(), 3));
    return out;
}

TEST_F(Hostile, ADamagedCompressedClusterHarmsNoOther) {
    const auto plain = text_cluster();
    for (const bool zstd : {false, true}) {
        auto image = compressed_image(zstd ? zstd_compressed(plain) : deflated(plain), zstd,
                                      [](HostileImage& i) { i.file.write(i.cluster(9), Bytes(64, std::byte{0xff})); });
        const auto opened = open_bounded(image.finish(16));
        ASSERT_TRUE(opened.has_value());
        Bytes bytes(plain.size());
        for (const std::uint64_t cluster : {0U, 1U, 3U, 2U, 0U}) {
            const auto read = (*opened)->read({cluster << 16}, bytes);
            if (cluster == 2) {
                expect_error(read, Errc::corrupt, {"guest offset 0x20000", "host offset 0x90000"});
            } else {
                ASSERT_TRUE(read.has_value()) << read.error().message();
                EXPECT_EQ(bytes, plain);
            }
        }
        Bytes all(4 * plain.size());
        expect_error((*opened)->read({0}, all), Errc::corrupt, {"guest offset 0x20000"});
        std::byte one = {};
        EXPECT_TRUE((*opened)->read({0x1ffff}, {&one, 1}).has_value());
        expect_error((*opened)->read({0x2ffff}, {&one, 1}), Errc::corrupt, {"host offset 0x90000"});
    }
}

TEST_F(Hostile, CompressedClustersThatLieElsewhere) {
    const auto plain = text_cluster();
    // Past the end, at the end of what can be addressed, in the header, with the longest length.
    for (const std::uint64_t word :
         {bit(40), low_bits(54), low_bits(62), std::uint64_t{0}, low_bits(62) & ~low_bits(54)}) {
        auto image = compressed_image(deflated(plain), false, [&](HostileImage& i) {
            i.file.write_word(i.cluster(4) + 16, format::compressed_bit | word);
        });
        const auto opened = open_bounded(image.finish(16));
        ASSERT_TRUE(opened.has_value());
        Bytes bytes(plain.size());
        expect_error((*opened)->read({0x20000}, bytes), Errc::corrupt, {"host offset 0x"});
        EXPECT_TRUE((*opened)->read({0x30000}, bytes).has_value());
        EXPECT_TRUE(check_bounded(**opened).has_value());
    }
}

TEST_F(Hostile, ZstdFrameThatClaimsFourGiB) {
    // A frame header with a content size of 2^32 + 5 bytes, in one segment and with a window of 2 GiB; then a block of
    // repeated bytes that never ends.
    for (const bool single_segment : {true, false}) {
        Bytes stream;
        append(stream, 0x28b52ffd, 4);
        append(stream, single_segment ? 0xe0 : 0xc0, 1);
        if (!single_segment) append(stream, 0xa8, 1);
        for (unsigned i = 0; i < 8; ++i) append(stream, std::uint64_t{0x1'0000'0005} >> (8 * i) & 0xff, 1);
        for (unsigned i = 0; i < 16; ++i) {
            const std::uint32_t block = 128 * 1024 << 3 | 1 << 1;  // 128 KiB of one byte, not the last
            for (unsigned b = 0; b < 3; ++b) append(stream, block >> (8 * b) & 0xff, 1);
            append(stream, 'z', 1);
        }
        auto image = compressed_image(stream, true, [](HostileImage&) {});
        const auto opened = open_bounded(image.finish(16));
        ASSERT_TRUE(opened.has_value());
        Bytes bytes(64 * KiB);
        Result<void> read;
        const auto cost = cost_of([&] { read = (*opened)->read({0}, bytes); });
        EXPECT_LT(cost.seconds, max_seconds);
        EXPECT_LT(cost.bytes, 64 * MiB * fatness);
        if (!read) expect_error(read, Errc::corrupt, {"host offset 0x50000"});
    }
}

/// Readers stop when the cluster is full, and do not care that a stream is cut off behind that point.
TEST_F(Hostile, DeflateStreamCutOffBehindAFullCluster) {
    const Bytes stream = {std::byte{0x3a}, std::byte{0}, std::byte{0}};
    Bytes out(1);
    EXPECT_TRUE(codec::inflate(stream, out).has_value());
    EXPECT_FALSE(codec::inflate(Bytes{}, out).has_value());
}

/// Old images have no limit of sectors: every table and every stream may lie at any byte.
TEST_F(Hostile, OldFormatEntriesThatLeadAstray) {
    for (const std::uint64_t l2 :
         {std::uint64_t{1}, ~std::uint64_t{0}, ~std::uint64_t{7}, bit(63), bit(56) - 1, std::uint64_t{4090}}) {
        for (const std::uint64_t entry : {~std::uint64_t{0}, bit(63), bit(63) | 4095, bit(63) - 1, std::uint64_t{1}}) {
            fuzz::SparseFile file;
            Bytes h;
            append(h, format::magic, 4);
            append(h, 1, 4);
            h.resize(24);
            append(h, 64 * KiB, 8);
            append(h, 12, 1);
            append(h, 9, 1);
            append(h, 0, 6);
            append(h, 48, 8);
            append(h, l2, 8);
            file.write(0, h);
            file.write_word(l2 % 4096 + 64, entry);
            file.write_word(4090, entry);
            file.fixed_size = l2 == bit(56) - 1 ? bit(62) : 8192;
            const auto opened = open_image(fuzz::storage_of(file, "old"));
            ASSERT_TRUE(opened.has_value());
            Bytes bytes(64 * KiB);
            if (const auto read = (*opened)->read({0}, bytes); !read) expect_error(read, Errc::corrupt, {"0x"});
            if (const auto usage = measure_usage(**opened); !usage) expect_good_message(usage.error());
        }
    }
}

TEST_F(Hostile, OldFormatWithManyCompressedClusters) {
    fuzz::SparseFile file;
    Bytes h;
    append(h, format::magic, 4);
    append(h, 1, 4);
    h.resize(24);
    append(h, 4 * MiB, 8);
    append(h, 9, 1);
    append(h, 13, 1);
    append(h, 0, 6);
    append(h, 48, 8);
    append(h, 1024, 8);
    file.write(0, h);
    const auto stream = deflated(Bytes(512));
    Bytes table;
    for (unsigned i = 0; i < 8192; ++i) append(table, bit(63) | std::uint64_t{stream.size()} << 54 | 512, 8);
    file.segments.push_back({1024, table});
    file.segments.push_back({512, stream});
    write("image", file);
    const auto opened = open_image(open("image"));
    ASSERT_TRUE(opened.has_value());
    Bytes bytes(4 * MiB);
    Result<void> read;
    const auto cost = cost_of([&] { read = (*opened)->read({0}, bytes); });
    EXPECT_TRUE(read.has_value());
    EXPECT_LT(cost.seconds, max_seconds);
}

// Chains.

TEST_F(Hostile, BackingLoops) {
    write("self", overlay("self"));
    write("a", overlay("b"));
    write("b", overlay("a"));
    write("link", overlay("other/../alias"));
    std::filesystem::create_directory(path("other"));
    std::filesystem::create_symlink("link", path("alias"));
    std::filesystem::create_hard_link(path("self"), path("hard"));
    for (const auto* name : {"self", "a", "link", "hard"}) {
        const auto result = open_bounded(open(name), local_files());
        expect_error(result, Errc::corrupt, {"loop"});
    }
    // A data file that is the image itself.
    HostileImage image(9);
    image.incompatible = 4;
    image.extensions.push_back({0x44415441, {}});
    append(image.extensions.back().data, "data");
    image.size = 4096;
    write("data", image.finish());
    expect_error(open_bounded(open("data"), local_files()), Errc::corrupt, {"twice"});
}

TEST_F(Hostile, LongChains) {
    HostileImage base(9);
    base.size = 4096;
    base.file.write_word(base.cluster(3), base.cluster(4));
    base.file.write_word(base.cluster(4) + 8, base.cluster(5));
    base.file.write(base.cluster(5), Bytes(512, std::byte{0x77}));
    write("layer0", base.finish(6));
    for (int i = 1; i < 300; ++i) write("layer" + std::to_string(i), overlay("layer" + std::to_string(i - 1)));

    const auto works = open_image(open("layer199"), options_for(Format::qcow2, local_files()));
    ASSERT_TRUE(works.has_value()) << works.error().message();
    Bytes bytes(512);
    ASSERT_TRUE((*works)->read({512}, bytes).has_value());
    EXPECT_EQ(bytes, Bytes(512, std::byte{0x77}));
    EXPECT_EQ((*works)->extent({512}, 512)->depth, 199U);

    expect_error(open_image(open("layer299"), options_for(Format::qcow2, local_files())), Errc::limit_exceeded,
                 {"256"});
}

// Names.

/// Opens an overlay of this backing name, and says which paths the gate was asked for.
std::vector<std::string> asked_for(const fuzz::SparseFile& overlay, Error& error) {
    std::vector<std::string> paths;
    const auto gate = [&](const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        paths.push_back(reference.path);
        return no_files()(reference);
    };
    const auto result = open_image(fuzz::storage_of(overlay, "images/top"), options_for(Format::qcow2, gate));
    EXPECT_FALSE(result.has_value());
    if (!result) {
        expect_good_message(result.error());
        error = result.error();
    }
    return paths;
}

TEST_F(Hostile, NothingIsOpenedThatTheGateDoesNotOpen) {
    for (const std::string name : {"/etc/shadow", "../../x", "x", "file:/etc/shadow"}) {
        expect_error(open_image(fuzz::storage_of(overlay(name), "top"), options_for(Format::qcow2)),
                     Errc::refused_by_policy, {"top", name.substr(name.size() - 1)});
    }
    Error error;
    EXPECT_EQ(asked_for(overlay("/etc/shadow"), error), std::vector<std::string>{"/etc/shadow"});
    EXPECT_EQ(asked_for(overlay("../../x"), error), std::vector<std::string>{"images/../../x"});
    EXPECT_EQ(asked_for(overlay("file:x"), error), std::vector<std::string>{"images/x"});
    EXPECT_EQ(asked_for(overlay(R"(json:{"driver":"qcow2","file":{"driver":"file","filename":"/etc/shadow"}})"), error),
              std::vector<std::string>{"/etc/shadow"});
    EXPECT_EQ(error.code, Errc::refused_by_policy);
}

TEST_F(Hostile, NamesThatAreNoPathsNeverReachTheGate) {
    const std::string zero("a\0b", 3);
    for (const std::string& name :
         {std::string("nbd:localhost:10809"), std::string("nbd://host/export"), std::string("https://host/x"),
          std::string("fd:3"), std::string("ssh://host/x"), std::string("json:"), std::string("json:[]"),
          std::string("json:{}"), std::string("json:nul"), std::string(R"(json:{"driver":"nbd","host":"h"})"),
          std::string(R"(json:{"driver":"qcow2","file":{"driver":"http","filename":"x"}})"),
          std::string(R"(json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"x"}})"),
          std::string(R"(json:{"driver":"qcow2","file":"node"})"),
          std::string(R"(json:{"driver":"file","filename":"a\u0000b"})"),
          std::string(R"(json:{"driver":"qcow2","backing":{"driver":"file","filename":"y"},"file.filename":"x"})"),
          zero, "json:" + std::string(1000, '['), std::string("file:")}) {
        Error error;
        EXPECT_TRUE(asked_for(overlay(name), error).empty()) << name;
        EXPECT_THAT(error.code, AnyOf(Errc::corrupt, Errc::unsupported)) << name;
    }
    Error error;
    EXPECT_TRUE(asked_for(overlay("x", "nbd"), error).empty());
    EXPECT_EQ(error.code, Errc::unsupported);
}

/// The name of a data file may be as long as a cluster; parsing a description must not be as deep as it likes.
TEST_F(Hostile, DeeplyNestedDescription) {
    for (const bool closed : {true, false}) {
        HostileImage image(21);
        image.incompatible = 4;
        constexpr std::size_t depth = 900'000;
        std::string name = R"(json:{"x":)" + std::string(depth, '[');
        if (closed) name += std::string(depth, ']') + "}";
        image.extensions.push_back({0x44415441, {}});
        append(image.extensions.back().data, name);
        Error error;
        EXPECT_TRUE(asked_for(image.finish(), error).empty());
        EXPECT_THAT(error.code, AnyOf(Errc::corrupt, Errc::unsupported));
    }
}

TEST_F(Hostile, BackingFilesThatAreNoFiles) {
    ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
    std::filesystem::create_directory(path("directory"));
    for (const std::string name : {"fifo", "directory", "/dev/null", "/dev/zero", "/dev/stdin"}) {
        write("top", overlay(name, "raw"));
        const auto result = open_bounded(open("top"), local_files());
        ASSERT_FALSE(result.has_value()) << name;
        expect_good_message(result.error());
        EXPECT_THAT(result.error().message(), HasSubstr("backing file of"));
    }
}

/// What a guest has written to a raw disk may look like an image that names other files.
TEST_F(Hostile, GuessedFormatsNameNoFurtherFiles) {
    write("secret", HostileImage(9).finish());
    write("guest", overlay("secret"));
    write("top", overlay("guest", ""));
    expect_error(open_bounded(open("top"), local_files()), Errc::refused_by_policy, {"guest", "secret", "format"});
    HostileImage data(9);
    data.size = 4096;
    data.incompatible = 4;
    data.extensions.push_back({0x44415441, {}});
    append(data.extensions.back().data, "secret");
    write("guest", data.finish());
    expect_error(open_bounded(open("top"), local_files()), Errc::refused_by_policy, {"guest", "secret"});
    // Where the overlay says that it is raw, it is.
    write("top", overlay("guest", "raw"));
    EXPECT_TRUE(open_bounded(open("top"), local_files()).has_value());
}

/// Without its data file the places in it mean nothing.
TEST_F(Hostile, ExternalDataFileThatWasNotOpened) {
    HostileImage image;
    image.incompatible = 4;
    image.extensions.push_back({0x44415441, {}});
    append(image.extensions.back().data, "data");
    image.file.write_word(image.cluster(3), image.cluster(4) | format::copied_bit);
    image.file.write_word(image.cluster(4), format::copied_bit);
    auto options = options_for(Format::qcow2);
    options.follow = false;
    const auto opened = open_image(fuzz::storage_of(image.finish(5), "image"), options);
    ASSERT_TRUE(opened.has_value());
    const auto extent = (*opened)->extent({0}, 512);
    ASSERT_TRUE(extent.has_value());
    EXPECT_EQ(extent->kind, Extent::Kind::data);
    EXPECT_EQ(extent->host.has_value(), extent->storage != nullptr);
    std::byte one = {};
    expect_error((*opened)->read({0}, {&one, 1}), Errc::not_found, {"data file"});
}

}  // namespace
}  // namespace qcow::hostile
