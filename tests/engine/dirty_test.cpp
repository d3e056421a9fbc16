// Images whose last writer kept refcounts in memory and did not close them.

#include <gtest/gtest.h>

#include "base/bits.h"
#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

class DirtyTest : public testing::Test {
protected:
    [[nodiscard]] std::string path() const { return directory_.file("disk.qcow2"); }

    /// QEMU writes, and dies before it has counted.
    void make_dirty(const std::string& options, const std::vector<std::string>& writes) const {
        must_run({"qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on," + options, path(), "64M"},
                 directory_.path());
        std::vector<std::string> command = {"qemu-io", "-f", "qcow2"};
        for (const auto& write : writes) command.insert(command.end(), {"-c", write});
        command.insert(command.end(), {"-c", "flush", "-c", "sigraise 9", path()});
        run(command, directory_.path());
    }

    [[nodiscard]] std::shared_ptr<Image> open(bool writable) const {
        return value_of(open_image(value_of(open_file(path(), {.writable = writable})),
                                   {.writable = writable, .format = Format::qcow2}));
    }

    void verify_clean() const {
        const auto image = open(false);
        EXPECT_FALSE(value_of(image->info()).dirty);
        EXPECT_TRUE(value_of(image->check({})).clean());
        must_run({"qemu-img", "check", "-q", path()}, directory_.path());
    }

    void verify_byte(Disk& disk, std::uint64_t at, unsigned value) const {
        std::byte byte = {};
        value_of(disk.read({at}, {&byte, 1}));
        EXPECT_EQ(byte, static_cast<std::byte>(value));
    }

    TemporaryDirectory directory_;
};

TEST_F(DirtyTest, OpeningForWritingCountsAnew) {
    make_dirty("cluster_size=4096", {"write -q -P 7 0 3M", "write -q -P 8 32M 64k"});
    ASSERT_TRUE(value_of(open(false)->info()).dirty);
    ASSERT_FALSE(value_of(open(false)->check({})).clean());
    {
        const auto image = open(true);
        EXPECT_FALSE(value_of(image->info()).dirty);
        verify_byte(*image, 3 * MiB - 1, 7);
        const std::vector<std::byte> bytes(1 * MiB, std::byte{9});
        value_of(image->write({16 * MiB}, bytes));
        value_of(image->close());
    }
    verify_clean();
    const auto image = open(false);
    verify_byte(*image, 3 * MiB - 1, 7);
    verify_byte(*image, 32 * MiB, 8);
    verify_byte(*image, 16 * MiB, 9);
}

TEST_F(DirtyTest, BlocksThatAreMissingAreMade) {
    // 512 bytes a cluster: a block counts 128 KiB, so most of what was written has none.
    make_dirty("cluster_size=512", {"write -q -P 5 0 2M"});
    ASSERT_TRUE(value_of(open(false)->info()).dirty);
    value_of(open(true)->close());
    verify_clean();
    verify_byte(*open(false), 2 * MiB - 1, 5);
}

TEST_F(DirtyTest, ReadingChangesNothing) {
    make_dirty("cluster_size=65536", {"write -q -P 7 0 1M"});
    verify_byte(*open(false), 1 * MiB - 1, 7);
    EXPECT_TRUE(value_of(open(false)->info()).dirty);
}

}  // namespace
}  // namespace qcow::test
