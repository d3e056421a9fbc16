// Changes of the virtual size of images that other programs left in an odd state.

#include <gtest/gtest.h>

#include "base/bits.h"
#include "base/endian.h"
#include "qcow/create.h"
#include "support/bytes.h"
#include "support/disks.h"

namespace qcow::test {
namespace {

class ResizeTest : public testing::TestWithParam<unsigned> {};

/// The entries behind the end of the disk are sound, and a check has nothing against them; but what they lead to is not
/// what a disk that has just grown holds.
TEST_P(ResizeTest, EntriesBehindTheEndDoNotComeToLight) {
    const auto storage = memory_storage();
    CreateOptions create;
    create.size = 1 * MiB;
    create.version = GetParam();
    value_of(create_image({storage, nullptr}, create));
    const auto open = [&] { return value_of(open_image(storage, {.writable = true, .format = Format::qcow2})); };
    const Bytes block(64 * KiB, std::byte{0x77});
    {
        const auto image = open();
        for (const std::uint64_t cluster : {0, 1, 5, 15}) value_of(image->write({cluster * block.size()}, block));
        value_of(image->close());
    }
    std::array<std::byte, 8> size;
    store_be(size, 0, 64 * KiB + 512);
    value_of(storage->write({24}, size));
    {
        const auto image = open();
        EXPECT_TRUE(value_of(image->check({})).clean());
        value_of(image->resize(8 * MiB));
        Bytes bytes(8 * MiB);
        value_of(image->read({0}, bytes));
        EXPECT_TRUE(std::ranges::equal(std::span(bytes).first(block.size()), block));
        EXPECT_EQ(bytes[64 * KiB + 511], std::byte{0x77});
        EXPECT_TRUE(is_zero(std::span(bytes).subspan(64 * KiB + 512)));
        value_of(image->close());
    }
    const auto report = value_of(open()->check({}));
    EXPECT_TRUE(report.clean());
    EXPECT_EQ(report.allocated_clusters, 2U);
}

/// The bit says something about an external data file. Without one, the file that would be resized with the disk is the
/// image's own.
TEST(ResizeRawBitTest, TheImageItselfIsNotCut) {
    const auto storage = memory_storage();
    CreateOptions create;
    create.size = 1 * MiB;
    value_of(create_image({storage, nullptr}, create));
    std::array<std::byte, 8> autoclear;
    store_be(autoclear, 0, std::uint64_t{2});
    value_of(storage->write({88}, autoclear));
    const auto image = value_of(open_image(storage, {.writable = true, .format = Format::qcow2}));
    const Bytes block(64 * KiB, std::byte{0x77});
    for (std::uint64_t at = 0; at < 1 * MiB; at += block.size()) value_of(image->write({at}, block));
    Bytes bytes(128 * KiB);
    for (const std::uint64_t size : {256 * KiB, 512 * KiB, 128 * KiB}) {
        value_of(image->resize(size, Image::Shrink::allow));
        value_of(image->read({0}, bytes));
        EXPECT_TRUE(bytes == Bytes(bytes.size(), std::byte{0x77})) << size;
    }
}

INSTANTIATE_TEST_SUITE_P(Versions, ResizeTest, testing::Values(2U, 3U));

}  // namespace
}  // namespace qcow::test
