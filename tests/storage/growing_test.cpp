#include "storage/growing.h"

#include <gtest/gtest.h>

#include "storage/pass_through.h"
#include "support/bytes.h"
#include "support/random.h"
#include "support/result.h"

namespace qcow {
namespace {

using namespace qcow::test;

constexpr std::size_t device_bytes = 1000;

/// Keeps its length, as a block device does.
class Device final : public PassThrough {
public:
    Device() : PassThrough(memory_storage(repeated(device_bytes, 0xaa))) {}
    Result<void> resize(std::uint64_t size) override {
        if (size <= device_bytes) return {};
        return std::unexpected(Error{Errc::no_space, name(), "the device is too small"});
    }
};

Bytes contents(const Storage& storage, std::size_t length) {
    Bytes found(length);
    must(storage.read({0}, found));
    return found;
}

TEST(GrowingStorage, IsNotNeededForAFile) {
    const auto file = memory_storage(repeated(10, 0xaa));
    EXPECT_EQ(must(as_empty(file)), file);
    EXPECT_EQ(must(file->size()), 0U);
}

TEST(GrowingStorage, IsLikeAFileThatWasEmpty) {
    Random random(1);
    for (int round = 0; round < 50; ++round) {
        const auto device = std::make_shared<Device>();
        const auto growing = must(as_empty(device));
        const auto file = memory_storage();
        for (int i = 0; i < 20; ++i) {
            const auto at = random.below(device_bytes);
            const auto length = 1 + random.below(device_bytes - at);
            const auto some = repeated(length, static_cast<std::uint8_t>(i));
            const auto what = random.below(5);
            for (auto* storage : {growing.get(), file.get()}) {
                if (what == 0) must(storage->resize(at));
                if (what == 1) must(storage->write_zeroes({at}, length));
                if (what == 2) must(storage->allocate({at}, length));
                if (what > 2) must(storage->write({at}, some));
            }
            ASSERT_EQ(must(growing->size()), must(file->size()));
            ASSERT_EQ(contents(*growing, device_bytes), contents(*file, device_bytes));
        }
        const auto size = must(growing->size());
        EXPECT_EQ(contents(*device, size), contents(*file, size)) << "other bytes than through the file";
    }
}

TEST(GrowingStorage, EndsWithTheDevice) {
    const auto device = std::make_shared<Device>();
    const auto growing = must(as_empty(device));
    EXPECT_TRUE(fails(growing->write({device_bytes - 1}, repeated(2, 1)), Errc::no_space, {"too small"}));
    EXPECT_TRUE(fails(growing->resize(device_bytes + 1), Errc::no_space));
    EXPECT_EQ(contents(*device, device_bytes), repeated(device_bytes, 0xaa)) << "changed for nothing";
}

}  // namespace
}  // namespace qcow
