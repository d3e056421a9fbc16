// Converting and compacting where the file system can share extents: they are shared, and the contents are right.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>

#include "base/bits.h"
#include "support/disks.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/reflink_directory.h"

namespace qcow::test {
namespace {

class ReflinkTest : public testing::Test {
protected:
    void SetUp() override {
        if (!directory_.obstacle().empty())
            GTEST_SKIP() << "no file system that shares extents: " << directory_.obstacle();
    }

    void convert(Arguments arguments) const {
        arguments.insert(arguments.begin(), {QCOW_TOOL, "convert"});
        must_run(arguments, directory_.path());
    }

    /// 8 MiB of data between holes, and an end that is not aligned to anything but sectors.
    void make_raw(const std::string& path) const {
        auto random = Random::named("reflink");
        std::ofstream file(path, std::ios::binary);
        for (const std::uint64_t at : {std::uint64_t{0}, 10 * MiB, 20 * MiB}) {
            file.seekp(static_cast<std::streamoff>(at));
            file << random.bytes(at == 10 * MiB ? 6 * MiB : MiB);
        }
        file.seekp(static_cast<std::streamoff>(24 * MiB));
        file << random.bytes(512 * 3);
    }

    void expect_equal(const std::string& image, const std::string& raw) const {
        const auto compared = qemu_img({"compare", "-f", "qcow2", "-F", "raw", image, raw});
        EXPECT_EQ(compared.status, 0) << compared.text();
    }

    ReflinkDirectory directory_;
};

TEST_F(ReflinkTest, RawToQcow2) {
    const auto raw = directory_ / "disk.raw";
    const auto image = directory_ / "disk.qcow2";
    make_raw(raw);
    convert({"-O", "qcow2", raw, image});
    EXPECT_EQ(shared_bytes(image), 8 * MiB);
    expect_equal(image, raw);
    EXPECT_EQ(qemu_img({"check", image}).status, 0);
}

TEST_F(ReflinkTest, Qcow2ToRaw) {
    const auto raw = directory_ / "disk.raw";
    const auto image = directory_ / "disk.qcow2";
    const auto back = directory_ / "back.raw";
    make_raw(raw);
    for (const auto* cluster : {"4k", "64k", "2M"}) {
        must_qemu_img({"convert", "-O", "qcow2", "-o", fmt::format("cluster_size={}", cluster), raw, image});
        convert({image, back});
        EXPECT_GE(shared_bytes(back), 8 * MiB) << cluster;
        EXPECT_FALSE(first_difference(ReferenceFile(raw), ReferenceFile(back))) << cluster;
    }
}

/// What moves is still shared with a copy of the image.
TEST_F(ReflinkTest, CompactingSharesWhatMoves) {
    const auto image = directory_ / "disk.qcow2";
    const auto copy = directory_ / "copy.qcow2";
    must_qemu_img({"create", "-q", "-f", "qcow2", image, "16M"});
    must_run({"qemu-io", "-d", "unmap", "-f", "qcow2", "-c", "write -q -P 1 0 8M", "-c", "write -q -P 2 8M 8M", "-c",
              "discard -q 0 8M", image});
    must_run({"cp", "--reflink=always", image, copy});
    must_run({QCOW_TOOL, "compact", image});
    EXPECT_LT(std::filesystem::file_size(image), 9 * MiB);
    EXPECT_GE(shared_bytes(image), 8 * MiB);
    EXPECT_EQ(qemu_img({"compare", image, copy}).status, 0);
    EXPECT_EQ(qemu_img({"check", image}).status, 0);
}

TEST_F(ReflinkTest, RawToRaw) {
    const auto raw = directory_ / "disk.raw";
    const auto copy = directory_ / "copy.raw";
    make_raw(raw);
    convert({raw, copy});
    EXPECT_GE(shared_bytes(copy), 8 * MiB);
    EXPECT_FALSE(first_difference(ReferenceFile(raw), ReferenceFile(copy)));
}

TEST_F(ReflinkTest, ClustersSmallerThanBlocksAreCopied) {
    const auto raw = directory_ / "disk.raw";
    const auto image = directory_ / "disk.qcow2";
    const auto back = directory_ / "back.raw";
    make_raw(raw);
    must_qemu_img({"convert", "-O", "qcow2", "-o", "cluster_size=512", raw, image});
    convert({image, back});
    EXPECT_FALSE(first_difference(ReferenceFile(raw), ReferenceFile(back)));
    convert({"-O", "qcow2", "-o", "cluster_size=512", raw, image});
    expect_equal(image, raw);
}

TEST_F(ReflinkTest, ChainOverTwoFileSystems) {
    const TemporaryDirectory elsewhere;
    const auto raw = directory_ / "disk.raw";
    const auto base = elsewhere / "base.qcow2";
    const auto overlay = directory_ / "overlay.qcow2";
    const auto back = directory_ / "back.raw";
    make_raw(raw);
    must_qemu_img({"convert", "-O", "qcow2", raw, base});
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay});
    must_qemu_io(overlay, "qcow2", {"write -P 7 11M 1M", "write -P 9 20M 100k"});
    must_qemu_io(raw, "raw", {"write -P 7 11M 1M", "write -P 9 20M 100k"});
    convert({overlay, back});
    EXPECT_FALSE(first_difference(ReferenceFile(raw), ReferenceFile(back)));
}

}  // namespace
}  // namespace qcow::test
