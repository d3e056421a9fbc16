// Snapshots and bitmaps that lie.

#include "fuzz/image_builder.h"
#include "hostile.h"

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
        expect_error(info_bounded(**opened), Errc::corrupt, {"bitmap directory at host offset 0x"});
        const auto report = check_bounded(**opened);
        ASSERT_TRUE(report.has_value());
        EXPECT_GT(report->corruptions, 0U);
    }
}

}  // namespace
}  // namespace qcow::hostile
