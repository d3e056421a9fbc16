// Snapshots and bitmaps that lie.

#include "fuzz/image_builder.h"
#include "fuzz/writable_storage.h"
#include "hostile.h"
#include "qcow/serve.h"
#include "storage/pass_through.h"

namespace qcow::hostile {
namespace {

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
        expect_error(whole_info_bounded(**opened), Errc::corrupt, {"snapshot table entry", "host offset 0x"});
        expect_error((*opened)->snapshots().open("1"), Errc::corrupt, {"snapshot table entry", "host offset 0x"});
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
    Result<std::size_t> read(HostOffset at, Buffers to) const override { return storage_->read(at, to); }
    Result<void> write(HostOffset at, ConstBuffers from) override { return storage_->write(at, from); }
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
    EXPECT_FALSE(whole_info_bounded(**opened).has_value());
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
        EXPECT_FALSE(whole_info_bounded(**opened).has_value());
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

/// A snapshot with the longest name, none of which can be shown as it is, and an L1 table of `entry` alone.
HostileImage named_at_length(std::uint64_t entry) {
    HostileImage image;
    image.write_refcounts(4);
    image.snapshots = 1;
    image.snapshot_table = 4;
    image.fill(image.cluster(8), bit(22), entry);
    auto snapshot = snapshot_entry(image.cluster(8), bit(22), 0);
    snapshot.resize(36 + 4 + 16 + 1);  // up to the name
    store_be<std::uint16_t>(snapshot, 14, 0xffff);
    snapshot.resize(snapshot.size() + 0xffff, std::byte{1});
    snapshot.resize((snapshot.size() + 7) / 8 * 8);
    image.file.write(image.cluster(4), snapshot);
    image.file.fixed_size = bit(28);
    return image;
}

TEST_F(Hostile, LongNamesOfWhatIsFlawed) {
    for (const std::uint64_t entry :
         {std::uint64_t{0x200}, std::uint64_t{1} << 40, format::copied_bit, std::uint64_t{1}}) {
        write("image", named_at_length(entry).finish());
        const auto opened = open_bounded(open("image"));
        ASSERT_TRUE(opened.has_value());
        const auto report = check_bounded(**opened, 64 * MiB);
        ASSERT_TRUE(report.has_value()) << report.error().message();
        EXPECT_GE(report->corruptions, bit(22));
        ASSERT_FALSE(report->findings.empty());
        for (const auto& finding : report->findings) EXPECT_LT(finding.place.size(), 1000U);
    }
}

Bytes bitmap_entry(std::uint64_t table, std::uint32_t entries, bool enabled = false, unsigned granularity_bits = 16) {
    Bytes entry;
    append(entry, table, 8);
    append(entry, entries, 4);
    append(entry, enabled ? 2 : 0, 4);
    append(entry, 1, 1);
    append(entry, granularity_bits, 1);
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

/// A name of 1023 bytes, and a table of eight million entries that are sound or not.
TEST_F(Hostile, LongNamesOfBitmaps) {
    for (const std::uint64_t entry : {std::uint64_t{8} << 16, std::uint64_t{0x200}}) {
        HostileImage image;
        image.autoclear = 1;
        image.write_refcounts(4);
        constexpr std::uint32_t entries = bit(23);
        image.fill(image.cluster(512), entries, entry);
        auto directory = bitmap_entry(image.cluster(512), entries);
        directory.resize(24);
        store_be<std::uint16_t>(directory, 18, 1023);
        directory.resize(24 + 1023, std::byte{1});
        directory.resize((directory.size() + 7) / 8 * 8);
        image.extensions.push_back(bitmaps_extension(1, directory.size(), image.cluster(4)));
        image.file.write(image.cluster(4), directory);
        image.file.fixed_size = bit(28);
        write("image", image.finish());
        const auto opened = open_bounded(open("image"));
        ASSERT_TRUE(opened.has_value());
        const auto report = check_bounded(**opened, 64 * MiB);
        ASSERT_TRUE(report.has_value()) << report.error().message();
        EXPECT_GT(report->corruptions, 0U);
    }
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

/// The image in a file that is nearly all hole, opened for writing.
Result<std::shared_ptr<Image>> open_in_a_hole(HostileImage image, std::uint64_t file_size,
                                              bool verify_refcounts = false) {
    image.write_refcounts(4);
    image.file.fixed_size = file_size;
    return open_for_writing_bounded(std::make_shared<fuzz::WritableStorage>(image.finish(), "hostile.qcow2"),
                                    verify_refcounts);
}

/// A writer has to know where metadata lie, which takes nothing for how long a table says it is.
TEST_F(Hostile, TablesOfSnapshotsThatAreLongHoles) {
    for (const unsigned bits : {9U, 16U}) {
        for (const std::uint32_t entries : {0xffff'ffffU, 0x0040'0001U, 0x0040'0000U}) {
            HostileImage image(bits);
            image.size = 4096;
            image.snapshots = 1;
            image.snapshot_table = bit(22);
            image.file.write(image.cluster(bit(22)), snapshot_entry(bit(36), entries, 4096));
            const auto opened = open_in_a_hole(std::move(image), bit(40));
            EXPECT_EQ(opened.has_value(), entries == 0x0040'0000);
            if (!opened)
                expect_error(opened, Errc::limit_exceeded, {"snapshot \"a\"", "32 MiB", "open the image for reading"});
        }
    }
}

TEST_F(Hostile, ManySnapshotsWithTablesOfTheLargestSize) {
    HostileImage image(9);
    image.size = 4096;
    image.snapshots = 65536;
    image.snapshot_table = bit(15);
    Bytes table;
    for (std::uint64_t i = 0; i < image.snapshots; ++i) {
        const auto one = snapshot_entry(bit(36) + i * bit(25), bit(22), 4096);
        table.insert(table.end(), one.begin(), one.end());
    }
    image.file.write(image.cluster(bit(15)), table);
    const auto opened = open_in_a_hole(std::move(image), bit(42));
    ASSERT_TRUE(opened.has_value()) << opened.error().message();
    EXPECT_TRUE((*opened)->write({0}, Bytes(4096)).has_value());
    EXPECT_TRUE((*opened)->close().has_value());
}

TEST_F(Hostile, TablesOfBitmapsThatAreLongHoles) {
    for (const unsigned bits : {9U, 16U}) {
        for (const std::uint32_t entries : {0xffff'ffffU, 0x0010'0000U}) {
            HostileImage image(bits);
            image.size = 4096;
            image.autoclear = 1;
            const auto directory = bitmap_entry(bit(36), entries);
            image.extensions.push_back(bitmaps_extension(1, directory.size(), bit(25)));
            image.file.write(bit(25), directory);
            const auto opened = open_in_a_hole(std::move(image), bit(40));
            EXPECT_EQ(opened.has_value(), bits == 9 && entries == 0x0010'0000);
            if (!opened)
                expect_error(opened, Errc::limit_exceeded, {"bitmap \"b\"", "512 MiB", "open the image for reading"});
        }
    }
}

TEST_F(Hostile, ManyBitmapsWithTablesOfTheLargestSize) {
    HostileImage image(9);
    image.size = 4096;
    image.autoclear = 1;
    Bytes directory;
    for (std::uint64_t i = 0; i < 65535; ++i) {
        const auto one = bitmap_entry(bit(36) + i * bit(23), bit(20));
        directory.insert(directory.end(), one.begin(), one.end());
    }
    image.extensions.push_back(bitmaps_extension(65535, directory.size(), bit(25)));
    image.file.write(bit(25), directory);
    EXPECT_TRUE(open_in_a_hole(image, bit(40)).has_value());
    // To count all of it would take more memory than is given for that.
    EXPECT_TRUE(open_in_a_hole(std::move(image), bit(40), true).has_value());
}

/// Enabled bitmaps that cannot be kept, in an image whose header is as large as headers get.
TEST_F(Hostile, ManyEnabledBitmapsWithoutTables) {
    HostileImage image(21);
    image.autoclear = 1;
    Bytes directory;
    for (unsigned i = 0; i < 65535; ++i) {
        const auto one = bitmap_entry(0, 0, true);
        directory.insert(directory.end(), one.begin(), one.end());
    }
    image.extensions.push_back(bitmaps_extension(65535, directory.size(), bit(25)));
    for (unsigned i = 0; i < 999; ++i) image.extensions.push_back({0x1000'0000 + i, Bytes(2000)});
    image.file.write(bit(25), directory);
    const auto opened = open_in_a_hole(std::move(image), bit(28));
    ASSERT_TRUE(opened.has_value()) << opened.error().message();
    const auto cost = cost_of([&] {
        EXPECT_TRUE((*opened)->write({0}, Bytes(512)).has_value());
        EXPECT_TRUE((*opened)->close().has_value());
    });
    EXPECT_LT(cost.seconds, max_seconds);
}

/// Counts what is read.
class CountingStorage final : public PassThrough {
public:
    using PassThrough::PassThrough;
    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        bytes_read += to.size();
        return PassThrough::read(at, to);
    }
    mutable std::uint64_t bytes_read = 0;
};

/// The directory is read when a bitmap is asked for, not each time.
TEST_F(Hostile, AskingAgainAboutOneOfManyBitmaps) {
    HostileImage image;
    image.autoclear = 1;
    Bytes directory;
    for (unsigned i = 0; i < 65535; ++i) {
        const auto one = bitmap_entry(bit(30), 1);
        directory.insert(directory.end(), one.begin(), one.end());
    }
    image.extensions.push_back(bitmaps_extension(65535, directory.size(), bit(25)));
    image.file.write(bit(25), directory);
    image.file.fixed_size = bit(31);
    const auto storage = std::make_shared<CountingStorage>(fuzz::storage_of(image.finish(), "hostile.qcow2"));
    const auto opened = open_bounded(storage);
    ASSERT_TRUE(opened.has_value());
    const auto ask = [&] {
        return (*opened)->each_dirty("b", {0}, image.size, [](const DirtyRun&) { return Result<void>(); });
    };
    ASSERT_TRUE(ask().has_value());
    storage->bytes_read = 0;
    const auto cost = cost_of([&] {
        for (int i = 0; i < 1000; ++i) ASSERT_TRUE(ask().has_value());
    });
    EXPECT_LT(storage->bytes_read, 64 * KiB);
    EXPECT_LT(cost.seconds, max_seconds);
    EXPECT_LT(cost.bytes, 4 * MiB * fatness);
}

/// Bits for single bytes, so that a disk of a tebibyte has 128 GiB of them: no answer is about all.
TEST_F(Hostile, AnswersAboutLargeBitmapsAreParts) {
    HostileImage image;
    image.size = bit(40);
    image.l1_entries = bit(11);
    image.l1_table = bit(12);
    image.autoclear = 1;
    const auto directory = bitmap_entry(bit(32), bit(21), false, 0);
    image.extensions.push_back(bitmaps_extension(1, directory.size(), bit(25)));
    image.file.write(bit(25), directory);
    image.file.fixed_size = bit(40);
    const auto opened = open_bounded(image.finish());
    ASSERT_TRUE(opened.has_value()) << opened.error().message();
    const auto context = dirty_bitmap_context(*opened, "b");
    ASSERT_TRUE(context.has_value()) << context.error().message();
    std::vector<std::uint64_t> lengths;
    const auto cost = cost_of([&] {
        EXPECT_TRUE(context
                        ->status({bit(30)}, bit(39),
                                 [&](const NbdStatus& run) {
                                     lengths.push_back(run.length);
                                     return true;
                                 })
                        .has_value());
    });
    EXPECT_THAT(lengths, testing::ElementsAre(8 * MiB));
    EXPECT_LT(cost.seconds, max_seconds);
}

/// Each is sound, but nobody could tell which one is meant.
TEST_F(Hostile, BitmapsOfOneName) {
    HostileImage image;
    image.autoclear = 1;
    image.write_refcounts(7);
    Bytes directory;
    for (unsigned i = 0; i < 2; ++i) {
        const auto one = bitmap_entry(image.cluster(5 + i), 1);
        directory.insert(directory.end(), one.begin(), one.end());
    }
    image.extensions.push_back(bitmaps_extension(2, directory.size(), image.cluster(4)));
    image.file.write(image.cluster(4), directory);
    const auto opened = open_bounded(image.finish(7));
    ASSERT_TRUE(opened.has_value());
    const auto report = check_bounded(**opened);
    ASSERT_TRUE(report.has_value());
    ASSERT_EQ(report->findings.size(), 1U);
    EXPECT_EQ(report->corruptions, 1U);
    EXPECT_EQ(report->findings.front().what, "there is more than one bitmap \"b\"");
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
        expect_error(whole_info_bounded(**opened), Errc::corrupt, {"bitmap directory at host offset 0x"});
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

}  // namespace
}  // namespace qcow::hostile
