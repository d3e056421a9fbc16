#include "qcow/concat.h"

#include <gtest/gtest.h>

#include "qcow/image.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow::test {
namespace {

std::shared_ptr<Disk> disk_of(Bytes contents) {
    return must(open_image(memory_storage(std::move(contents)), {.format = Format::raw}));
}

/// A disk of no bytes that claims to have many.
class HugeDisk final : public Disk {
public:
    [[nodiscard]] std::uint64_t size() const override { return (std::uint64_t{1} << 62) + 1; }
    [[nodiscard]] std::uint64_t block_size() const override { return 4096; }
    Result<void> do_read(GuestOffset, Buffers) override { return {}; }
    Result<Extent> do_extent(GuestOffset, std::uint64_t) override { return Extent{}; }
};

TEST(ConcatTest, PartsFollowEachOther) {
    const auto disk = must(concatenate({disk_of(repeated(512, 1)), disk_of({}), disk_of(repeated(1024, 2))}));
    ASSERT_EQ(disk->size(), 1536U);
    Bytes all(1536);
    must(disk->read({0}, all));
    EXPECT_EQ(all, joined({repeated(512, 1), repeated(1024, 2)}));
    Bytes across(4);
    must(disk->read({510}, across));
    EXPECT_EQ(across, bytes({1, 1, 2, 2}));
}

TEST(ConcatTest, PartsAreFilledUpToASector) {
    const auto disk = must(concatenate({disk_of(repeated(100, 1)), disk_of(repeated(1, 2))}));
    ASSERT_EQ(disk->size(), 1024U);
    Bytes all(1024);
    must(disk->read({0}, all));
    EXPECT_EQ(all, joined({repeated(100, 1), repeated(412, 0), repeated(1, 2), repeated(511, 0)}));
    const auto padding = must(disk->extent({100}, 1000));
    EXPECT_EQ(padding.start, GuestOffset{100});
    EXPECT_EQ(padding.length, 412U);
    EXPECT_EQ(padding.kind, Extent::Kind::unallocated);
}

TEST(ConcatTest, ExtentsSayWhereTheDataLieInTheirPart) {
    const auto disk = must(concatenate({disk_of(repeated(512, 1)), disk_of(repeated(1024, 2))}));
    const auto first = must(disk->extent({0}, 1536));
    EXPECT_EQ(first.length, 512U);
    const auto second = must(disk->extent({1000}, 100));
    EXPECT_EQ(second.start, GuestOffset{1000});
    EXPECT_EQ(second.length, 100U);
    EXPECT_EQ(second.host, HostOffset{488});
    EXPECT_NE(second.storage, first.storage);
}

TEST(ConcatTest, NothingAndTooMuch) {
    EXPECT_EQ(must(concatenate({}))->size(), 0U);
    const auto disk = must(concatenate({disk_of(repeated(512, 1))}));
    Bytes two(2);
    EXPECT_TRUE(fails(disk->read({511}, two), Errc::invalid_argument));
    EXPECT_TRUE(fails(disk->extent({512}, 1), Errc::invalid_argument));
    const auto huge = std::make_shared<HugeDisk>();
    EXPECT_TRUE(fails(concatenate({huge, huge}), Errc::limit_exceeded));
}

}  // namespace
}  // namespace qcow::test
