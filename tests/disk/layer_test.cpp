// What WriteOptions ask for, and what requests are verified for: the same in every format.

#include "disk/layer.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/bits.h"
#include "qcow/create.h"
#include "support/bytes.h"
#include "support/counting_storage.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t size = 1 * MiB;

class LayerTest : public testing::TestWithParam<Format> {
protected:
    void SetUp() override {
        // A real file, which can tell holes.
        const auto path = directory_.file("image");
        std::ofstream(path).close();
        const auto file = must(open_file(path, {.writable = true}));
        if (GetParam() == Format::qcow2) {
            must(create_image({file, nullptr}, {.size = size, .cluster_size = 4096}));
        } else {
            must(file->resize(size));
        }
        file_ = std::make_shared<CountingStorage>(file);
    }

    std::shared_ptr<Image> open(const WriteOptions& options) {
        return must(open_image(file_, {.writable = true, .write = options, .format = GetParam()}));
    }

    TemporaryDirectory directory_;
    std::shared_ptr<CountingStorage> file_;
};

Extent::Kind kind_at(Image& image, std::uint64_t at) { return must(image.extent({at}, 4096)).kind; }

TEST_P(LayerTest, ZerosAreLookedForBlockByBlock) {
    const auto image = open({.detect_zeroes = DetectZeroes::unmap});
    must(image->write({0}, repeated(4 * 4096, 1)));
    auto mixed = repeated(4 * 4096, 2);
    std::fill_n(mixed.begin() + 4096, 2 * 4096, std::byte{0});
    must(image->write({0}, mixed));
    EXPECT_EQ(kind_at(*image, 0), Extent::Kind::data);
    EXPECT_NE(kind_at(*image, 4096), Extent::Kind::data);
    EXPECT_NE(kind_at(*image, 2 * 4096), Extent::Kind::data);
    EXPECT_EQ(kind_at(*image, 3 * 4096), Extent::Kind::data);
    Bytes read(mixed.size());
    must(image->read({0}, read));
    EXPECT_EQ(read, mixed);
}

TEST_P(LayerTest, WithoutThatZerosAreWritten) {
    const auto image = open({});
    must(image->write({0}, Bytes(4096)));
    EXPECT_EQ(kind_at(*image, 0), Extent::Kind::data);
}

TEST_P(LayerTest, WritethroughFlushesEveryChange) {
    const auto image = open({.cache = CacheMode::writethrough});
    must(image->write({0}, repeated(4096, 1)));
    const auto flushed = [&](const auto& change) {
        const auto before = file_->flushes.load();
        must(change());
        return file_->flushes - before;
    };
    EXPECT_EQ(flushed([&] { return image->write({0}, repeated(4096, 2)); }), 1U);
    EXPECT_GE(flushed([&] { return image->write_zeroes({0}, 4096); }), 1U);
    must(image->write({0}, repeated(4096, 2)));
    EXPECT_GE(flushed([&] { return image->discard({0}, 4096); }), 1U);
}

TEST_P(LayerTest, WritebackFlushesNoneOfThem) {
    const auto image = open({});
    must(image->write({0}, repeated(4096, 1)));
    must(image->flush());
    const auto before = file_->flushes.load();
    must(image->write({0}, repeated(4096, 2)));
    EXPECT_EQ(file_->flushes, before);
}

TEST_P(LayerTest, ADiscardIsAboutWholeBlocks) {
    const auto image = open({});
    const auto bytes = repeated(4 * 4096, 1);
    must(image->write({0}, bytes));
    must(image->discard({512}, 3 * 4096));
    EXPECT_EQ(kind_at(*image, 0), Extent::Kind::data);
    EXPECT_NE(kind_at(*image, 4096), Extent::Kind::data);
    EXPECT_NE(kind_at(*image, 2 * 4096), Extent::Kind::data);
    EXPECT_EQ(kind_at(*image, 3 * 4096), Extent::Kind::data);
}

TEST_P(LayerTest, ADiscardIsNothingWhereTheOptionsExcludeIt) {
    const auto image = open({.discard = false});
    must(image->write({0}, repeated(4096, 1)));
    must(image->discard({0}, 4096));
    EXPECT_EQ(kind_at(*image, 0), Extent::Kind::data);
}

TEST_P(LayerTest, RangesAreVerifiedBeforeAnythingHappens) {
    const auto image = open({});
    Bytes bytes(1024);
    const auto writes = file_->writes.load();
    EXPECT_TRUE(fails(image->read({size - 512}, bytes), Errc::invalid_argument));
    EXPECT_TRUE(fails(image->write({size - 512}, bytes), Errc::invalid_argument));
    EXPECT_TRUE(fails(image->write_zeroes({size - 512}, 1024), Errc::invalid_argument));
    EXPECT_TRUE(fails(image->discard({~std::uint64_t{0}}, 2), Errc::invalid_argument));
    EXPECT_TRUE(fails(image->extent({size}, 1), Errc::invalid_argument));
    EXPECT_EQ(file_->writes, writes);
    EXPECT_EQ(must(image->extent({size - 512}, MiB)).length, 512U);
}

TEST_P(LayerTest, NothingIsWrittenToWhatIsOpenForReadingOrClosed) {
    const auto reader = must(open_image(file_, {.format = GetParam()}));
    const auto writer = open({});
    must(writer->close());
    for (const auto& image : {reader, writer}) {
        EXPECT_TRUE(fails(image->write({0}, Bytes(512)), Errc::read_only));
        EXPECT_TRUE(fails(image->write_zeroes({0}, 512), Errc::read_only));
        EXPECT_TRUE(fails(image->discard({0}, 4096), Errc::read_only));
        EXPECT_TRUE(fails(image->resize(2 * MiB), Errc::read_only));
        Bytes read(512);
        must(image->read({0}, read));
    }
}

TEST(DiskTest, MemoryThatRunsOutIsAnError) {
    class Hungry final : public Disk {
    public:
        [[nodiscard]] std::uint64_t size() const override { return MiB; }
        [[nodiscard]] std::uint64_t block_size() const override { return 512; }

    protected:
        Result<void> do_read(GuestOffset, Buffers) override { throw std::bad_alloc(); }
        Result<Extent> do_extent(GuestOffset, std::uint64_t) override { throw std::bad_alloc(); }
        Result<void> do_flush() override { throw std::bad_alloc(); }
    } disk;
    Bytes read(512);
    EXPECT_TRUE(fails(disk.read({0}, read), Errc::no_memory));
    EXPECT_TRUE(fails(disk.extent({0}, 1), Errc::no_memory));
    EXPECT_TRUE(fails(disk.flush(), Errc::no_memory));
}

INSTANTIATE_TEST_SUITE_P(Formats, LayerTest, testing::Values(Format::raw, Format::qcow2),
                         [](const auto& instance) { return std::string(format_name(instance.param)); });

}  // namespace
}  // namespace qcow::test
