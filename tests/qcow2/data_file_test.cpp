#include "qcow2/data_file.h"

#include <gtest/gtest.h>

#include "qcow2/open_parts.h"

namespace qcow::test {
namespace {

TEST(DataFileTest, OfTheImageItselfLiesInTheImageFile) {
    OpenParts open;
    auto& data = open.parts->data;
    EXPECT_FALSE(data.is_external());
    EXPECT_TRUE(data.fresh_bytes_are_zeros());
    EXPECT_EQ(data.to_flush(), nullptr);
    must(data.write({0x9000}, {0}, repeated(4096, 7)));
    Bytes read(4096);
    must(data.read({0x9000}, {0}, read));
    EXPECT_EQ(read, repeated(4096, 7));
    must(open.file->read({0x9000}, read));
    EXPECT_EQ(read, repeated(4096, 7));
}

TEST(DataFileTest, GuestDataAreNotWrittenOverMetadata) {
    OpenParts open;
    open.parts->data.protect(open.metadata.get());
    const auto written = open.parts->data.write({0}, {0}, repeated(512, 7));
    ASSERT_FALSE(written);
    EXPECT_EQ(written.error().code, Errc::corrupt);
    EXPECT_TRUE(open.parts->metadata.state().has(format::incompatible::corrupt));
    EXPECT_FALSE(open.metadata->verify_writable());
}

TEST(DataFileTest, TheLastClusterOfAFileNeedNotBeComplete) {
    OpenParts open;
    must(open.file->resize(0x9000 + 100));
    Bytes read(4096, std::byte{1});
    must(open.parts->data.read({0x9000}, {0}, read));
    EXPECT_EQ(read, Bytes(4096));
    const auto past = open.parts->data.read({0xa000}, {0x3000}, read);
    ASSERT_FALSE(past);
    EXPECT_EQ(past.error().code, Errc::corrupt);
    EXPECT_EQ(past.error().unreadable.start, GuestOffset{0x3000});
    EXPECT_EQ(past.error().unreadable.length, 4096U);
}

TEST(DataFileTest, AnExternalOneMayHoldAnythingAndEndsWithItsFile) {
    const auto external = memory_storage();
    CreateOptions options{.size = std::uint64_t{1} << 20, .cluster_size = 4096};
    options.data_file_name = "data";
    OpenParts open(options, external);
    auto& data = open.parts->data;
    EXPECT_TRUE(data.is_external());
    EXPECT_FALSE(data.fresh_bytes_are_zeros());
    EXPECT_EQ(data.to_flush(), external.get());
    must(data.write({0}, {0}, repeated(512, 7)));  // where the image file has its header
    EXPECT_FALSE(open.parts->metadata.state().has(format::incompatible::corrupt));
    must(external->resize(1000));
    Bytes read(512);
    EXPECT_FALSE(data.read({512}, {512}, read));
}

}  // namespace
}  // namespace qcow::test
