// Images whose tables lead writes to where metadata lie.

#include <gtest/gtest.h>

#include "base/bits.h"
#include "base/endian.h"
#include "qcow/create.h"
#include "support/bytes.h"
#include "support/disks.h"
#include "support/result.h"

namespace qcow::test {
namespace {

class CorruptTest : public testing::Test {
protected:
    CorruptTest() {
        CreateOptions options;
        options.size = 16 * MiB;
        value_of(create_image({storage_, nullptr}, options));
        const auto image = value_of(open(true));
        value_of(image->write({0}, block_));
        value_of(image->close());
    }

    /// Believes the refcounts: what is tested here are the guards behind them.
    Result<std::shared_ptr<Image>> open(bool writable) {
        return open_image(storage_,
                          {.writable = writable, .write = {.verify_refcounts = false}, .format = Format::qcow2});
    }

    std::uint64_t word_at(std::uint64_t at) {
        std::array<std::byte, 8> bytes;
        value_of(storage_->read({at}, bytes));
        return load_be<std::uint64_t>(bytes, 0);
    }

    void put_word(std::uint64_t at, std::uint64_t word) {
        std::array<std::byte, 8> bytes;
        store_be(bytes, 0, word);
        value_of(storage_->write({at}, bytes));
    }

    std::uint64_t refcount_table() { return word_at(48); }
    std::uint64_t refcount_block() { return word_at(refcount_table()); }
    std::uint64_t l2_table() { return word_at(word_at(40)) & ~(std::uint64_t{1} << 63); }

    Bytes contents() {
        Bytes bytes(value_of(storage_->size()));
        value_of(storage_->read({0}, bytes));
        return bytes;
    }

    /// Nothing but the feature bits in the header may differ from before.
    void expect_only_the_mark(Bytes before) {
        auto now = contents();
        const auto features = std::span(now).subspan(72, 8);
        EXPECT_EQ(load_be<std::uint64_t>(features, 0) & 2, 2U) << "the corrupt bit";
        std::ranges::copy(std::span(before).subspan(72, 8), features.begin());
        now.resize(before.size());  // a run that was being reserved may lie behind the end
        EXPECT_TRUE(now == before);
    }

    /// A new image, open for writing, over this one.
    Result<std::shared_ptr<Image>> open_overlay() {
        const auto top = memory_storage();
        CreateOptions options;
        options.size = 16 * MiB;
        options.backing_name = "base";
        options.backing_format = "qcow2";
        value_of(create_image({top, nullptr}, options));
        OpenOptions writable = {.writable = true, .format = Format::qcow2};
        writable.gate = [&](const FileReference&) -> Result<std::shared_ptr<Storage>> { return storage_; };
        return open_image(top, writable);
    }

    void expect_refused(const Result<void>& result) {
        ASSERT_FALSE(result);
        EXPECT_EQ(result.error().code, Errc::corrupt) << result.error().message();
    }

    const Bytes block_ = Bytes(64 * KiB, std::byte{0x77});
    std::shared_ptr<Storage> storage_ = memory_storage();
};

TEST_F(CorruptTest, DataThatLieInMetadataAreNotWritten) {
    for (const auto target : {std::uint64_t{0}, refcount_table(), refcount_block(), l2_table()}) {
        put_word(l2_table(), target | std::uint64_t{1} << 63);
        if (target == 0) continue;  // offset 0 means that there is no place
        const auto before = contents();
        const auto image = value_of(open(true));
        expect_refused(image->write({4096}, std::span(block_).first(512)));
        expect_refused(image->write({1 * MiB}, block_));
        expect_refused(image->flush());
        expect_only_the_mark(before);
        const auto again = open(true);
        ASSERT_FALSE(again);
        EXPECT_EQ(again.error().code, Errc::corrupt);
        EXPECT_TRUE(value_of(value_of(open(false))->info()).corrupt);
        value_of(storage_->write({72}, std::span(before).subspan(72, 8)));
    }
}

/// An entry that is not marked as COPIED has its place given up when it is written. A compressed one may begin
/// anywhere, in the header, too.
TEST_F(CorruptTest, MetadataAreNotFreedAsGuestData) {
    const std::uint64_t copied = std::uint64_t{1} << 63;
    const std::uint64_t compressed = std::uint64_t{1} << 62;
    for (const auto entry :
         {refcount_table(), refcount_block(), l2_table(), compressed | 512, compressed | l2_table()}) {
        put_word(l2_table(), entry & ~copied);
        const auto table = contents();
        {
            const auto image = value_of(open(true));
            const auto written = image->discard({0}, block_.size());
            if (written) expect_refused(image->flush());
            expect_refused(image->write({1 * MiB}, block_));
        }
        const auto now = contents();
        EXPECT_TRUE(std::ranges::equal(std::span(now).subspan(80, 512), std::span(table).subspan(80, 512)));
        EXPECT_EQ(word_at(word_at(40)), l2_table() | copied);
        EXPECT_NE(word_at(refcount_table()), 0U);
        EXPECT_NE(word_at(refcount_block()), 0U);
        EXPECT_TRUE(value_of(value_of(open(false))->info()).corrupt);
        value_of(storage_->write({72}, std::span(table).subspan(72, 8)));
    }
}

/// A table that is replaced is still what the file leads to, until the next flush. An entry of its own leads there,
/// too, and says that it may be written.
TEST_F(CorruptTest, ReplacedTablesAreNotWrittenBeforeTheyAreFree) {
    const std::uint64_t copied = std::uint64_t{1} << 63;
    const auto table = l2_table();
    put_word(word_at(40), table);
    put_word(table + 5 * 8, table | copied);
    const auto image = value_of(open(true));
    value_of(image->write({1 * MiB}, block_));
    const auto first = word_at(table);
    // The table was shared, so that what it leads to counts as shared.
    value_of(image->write({5 * block_.size()}, block_));
    EXPECT_EQ(word_at(table), first);
    expect_refused(image->flush());
}

TEST_F(CorruptTest, MetadataInFreeClustersAreNotHandedOut) {
    const auto cluster = l2_table() / (64 * KiB);
    std::array<std::byte, 2> zero = {};
    value_of(storage_->write({refcount_block() + cluster * 2}, zero));
    const auto before = contents();
    const auto image = value_of(open(true));
    expect_refused(image->write({1 * MiB}, block_));
    expect_only_the_mark(before);
}

/// A damaged entry that a request meets, also one that only reads, is seen to before more is written.
TEST_F(CorruptTest, DamagedEntriesStopWriting) {
    const auto l2 = l2_table();
    const auto sound = contents();
    const auto read = [&](Image& image) {
        Bytes to(512);
        return image.read({0}, to);
    };
    const auto write = [&](Image& image) { return image.write({512}, std::span(block_).first(512)); };
    const auto zero = [&](Image& image) { return image.write_zeroes({0}, 64 * KiB); };
    const auto discard = [&](Image& image) { return image.discard({0}, 64 * KiB); };
    const auto extent = [&](Image& image) -> Result<void> {
        if (auto result = image.extent({0}, 512); !result) return std::unexpected(result.error());
        return {};
    };
    const auto compress = [&](Image& image) { return image.write_compressed({0}, block_); };
    for (const auto& request :
         std::initializer_list<std::function<Result<void>(Image&)>>{read, write, zero, discard, extent, compress}) {
        value_of(storage_->write({0}, sound));
        put_word(l2, word_at(l2) | 0x200);  // not a multiple of the cluster size
        const auto before = contents();
        const auto image = value_of(open(true));
        expect_refused(request(*image));
        expect_refused(image->write({1 * MiB}, block_));
        expect_only_the_mark(before);
    }
}

/// Damage below is not the image's own.
TEST_F(CorruptTest, DamageOfABackingFileIsNotMarkedAbove) {
    put_word(l2_table(), 0x200);
    const auto image = value_of(open_overlay());
    Bytes to(512);
    expect_refused(image->read({0}, to));
    expect_refused(image->write({512}, std::span(block_).first(512)));
    value_of(image->write({1 * MiB}, block_));
    EXPECT_FALSE(value_of(image->info()).corrupt);
}

/// Refcounts that are too low: what clusters hold is safe, and the image says what is wrong.
class UncountedTest : public CorruptTest {
protected:
    void set_refcount(std::uint64_t cluster, std::uint8_t count) {
        const std::array<std::byte, 2> bytes = {std::byte{0}, std::byte{count}};
        value_of(storage_->write({refcount_block() + cluster * 2}, bytes));
    }

    void expect_not_opened() {
        const auto before = contents();
        const auto image = open_image(storage_, {.writable = true, .format = Format::qcow2});
        ASSERT_FALSE(image);
        EXPECT_EQ(image.error().code, Errc::corrupt);
        EXPECT_NE(image.error().message().find("qcow convert"), std::string::npos) << image.error().message();
        expect_only_the_mark(before);
        Bytes to(block_.size());
        value_of(value_of(open(false))->read({0}, to));
        EXPECT_TRUE(to == block_);
    }
};

TEST_F(UncountedTest, DataWithoutARefcount) {
    set_refcount((word_at(l2_table()) & ~(std::uint64_t{1} << 63)) / (64 * KiB), 0);
    expect_not_opened();
}

TEST_F(UncountedTest, ATableWithoutARefcount) {
    set_refcount(l2_table() / (64 * KiB), 0);
    expect_not_opened();
}

TEST_F(UncountedTest, ABlockThatNothingNames) {
    put_word(refcount_table(), 0);
    expect_not_opened();
}

/// The first of two owners that lets go would free what the other one has.
TEST_F(UncountedTest, TwoReferencesAndOneRefcount) {
    const auto entry = word_at(l2_table()) & ~(std::uint64_t{1} << 63);
    put_word(l2_table(), entry);
    put_word(l2_table() + 8, entry);
    expect_not_opened();
}

/// The first of two owners that writes would write over what the other one has.
TEST_F(UncountedTest, SharedAndMarkedAsItsOwn) {
    const auto entry = word_at(l2_table());
    put_word(l2_table() + 8, entry);
    set_refcount((entry & ~(std::uint64_t{1} << 63)) / (64 * KiB), 2);
    expect_not_opened();
}

/// What a write puts behind the end of a file would make the data that were cut off zeros.
TEST_F(UncountedTest, DataPastTheEndOfTheFile) {
    put_word(l2_table() + 8, (contents().size() + 4 * 64 * KiB) | std::uint64_t{1} << 63);
    const auto before = contents();
    const auto image = open_image(storage_, {.writable = true, .format = Format::qcow2});
    EXPECT_TRUE(fails(image, Errc::corrupt, {"guest offset 0x10000", "past the end of the file", "convert --salvage"}));
    expect_only_the_mark(before);
}

class CutDataFileTest : public testing::Test {
protected:
    void create(bool raw) {
        CreateOptions options;
        options.size = 1 * MiB;
        options.data_file_name = "data";
        options.data_file_raw = raw;
        file_ = memory_storage();
        data_ = memory_storage();
        value_of(create_image({file_, data_}, options));
    }

    Result<void> write(std::uint64_t at) {
        OpenOptions writable = {.writable = true, .format = Format::qcow2};
        writable.gate = [&](const FileReference&) -> Result<std::shared_ptr<Storage>> { return data_; };
        auto image = open_image(file_, writable);
        if (!image) return std::unexpected(image.error());
        value_of((*image)->write({at}, Bytes(64 * KiB, std::byte{0x77})));
        return (*image)->close();
    }

    std::shared_ptr<Storage> file_;
    std::shared_ptr<Storage> data_;
};

TEST_F(CutDataFileTest, IsNotWrittenAndASparseOneIs) {
    for (const bool raw : {false, true}) {
        create(raw);
        value_of(write(0));
        value_of(write(512 * KiB));  // there is a hole before it, and one behind it
        value_of(data_->resize(512 * KiB + 4096));
        EXPECT_TRUE(fails(write(0), Errc::corrupt, {"convert --salvage"})) << raw;
        EXPECT_EQ(value_of(data_->size()), 512 * KiB + 4096) << raw;
    }
}

/// Others read a raw file without looking at the image: it ends with the disk, whatever is mapped.
TEST_F(CutDataFileTest, ARawOneEndsWithTheDisk) {
    create(false);
    const std::byte raw{2};
    value_of(file_->write({95}, {&raw, 1}));  // autoclear feature bit 1
    value_of(write(0));
    value_of(data_->resize(512 * KiB));
    EXPECT_TRUE(fails(write(0), Errc::corrupt, {"the file was cut", "convert --salvage"}));
}

/// What wastes space, or costs a copy more than need be, is no reason to refuse.
TEST_F(UncountedTest, RefcountsThatAreTooHighDoNoHarm) {
    const auto entry = word_at(l2_table());
    set_refcount((entry & ~(std::uint64_t{1} << 63)) / (64 * KiB), 3);
    set_refcount(l2_table() / (64 * KiB) + 40, 1);
    put_word(l2_table(), entry & ~(std::uint64_t{1} << 63));
    const auto image = value_of(open_image(storage_, {.writable = true, .format = Format::qcow2}));
    value_of(image->write({0}, block_));
    value_of(image->close());
    EXPECT_FALSE(value_of(value_of(open(false))->info()).corrupt);
}

TEST_F(UncountedTest, RefcountsAreBelievedWhereTheCallerSaysSo) {
    set_refcount((word_at(l2_table()) & ~(std::uint64_t{1} << 63)) / (64 * KiB), 0);
    value_of(open(true));
}

/// What a write needs to know of the layer below may be what cannot be read. It has taken clusters by then.
TEST_F(CorruptTest, AWriteThatFailsOverADamagedBackingFileLeaksNothing) {
    put_word(word_at(40), 512);
    const auto image = value_of(open_overlay());
    expect_refused(image->write({4096}, std::span(block_).first(512)));
    expect_refused(image->write({1 * MiB}, block_));
    value_of(image->close());
    EXPECT_TRUE(value_of(image->check({})).clean());
}

TEST_F(CorruptTest, TablesThatOverlapAreNotOpenedForWriting) {
    put_word(word_at(40), refcount_block() | std::uint64_t{1} << 63);
    const auto before = contents();
    const auto image = open(true);
    ASSERT_FALSE(image);
    EXPECT_EQ(image.error().code, Errc::corrupt);
    EXPECT_NE(image.error().message().find("overlap"), std::string::npos) << image.error().message();
    EXPECT_TRUE(contents() == before);
}

}  // namespace
}  // namespace qcow::test
