// Digests of disks. What they are is held against the construction in docs/digest.md by tests/tool/digest_test.cpp.

#include "qcow/digest.h"

#include <gtest/gtest.h>

#include "base/bits.h"
#include "qcow/create.h"
#include "server/test_disk.h"
#include "support/result.h"
#include "support/temporary_directory.h"

#ifdef QCOW_HAS_DIGEST
namespace qcow {
namespace {

using namespace qcow::test;

constexpr auto block_bytes = TestDisk::block;

TEST(Digest, DependsOnContentsAndSizeAlone) {
    auto random = Random::named("digest");
    TestDisk disk(40 * block_bytes + 512);
    disk.fill(random);
    for (const std::uint64_t at : {0, 1, 7, 20, 39}) disk.punch(at * block_bytes);
    const auto digest = must(digest_disk(disk, {.workers = 1}));
    EXPECT_EQ(digest.size(), 32U);
    disk.slow_sector = 3 * block_bytes;  // others overtake it
    EXPECT_EQ(must(digest_disk(disk, {.workers = 8})), digest);

    TestDisk stored(disk.size(), 4096);  // zeros are data here
    must(stored.write({0}, std::span<const std::byte>(disk.bytes())));
    EXPECT_EQ(must(digest_disk(stored)), digest);
    TestDisk longer(disk.size() + 512);
    must(longer.write({0}, std::span<const std::byte>(disk.bytes())));
    EXPECT_NE(must(digest_disk(longer)), digest);
    for (const std::uint64_t at : {std::uint64_t{0}, 5 * block_bytes + 3, 40 * block_bytes + 511}) {
        stored.bytes()[at] ^= std::byte{1};
        EXPECT_NE(must(digest_disk(stored)), digest) << at;
        stored.bytes()[at] ^= std::byte{1};
    }
}

TEST(Digest, HolesAreNotRead) {
    TestDisk disk(1000 * block_bytes);
    for (std::uint64_t at = 0; at < disk.size(); at += block_bytes) disk.punch(at);
    EXPECT_EQ(must(digest_disk(disk)).size(), 32U);
    EXPECT_LE(disk.reads, 1U);  // of no bytes
}

TEST(Digest, SmallHolesAreNotReadEither) {
    // A table of such an image maps 32 KiB, and is told of by itself.
    const TemporaryDirectory directory;
    const auto path = directory / "disk";
    must(create({.image = {.path = path, .options = {.size = 64 * MiB, .cluster_size = 512}}}));
    TestDisk disk(64 * MiB);
    EXPECT_EQ(must(digest({.image = {.location = {.path = path}}})).digest, must(digest_disk(disk)));
}

TEST(Digest, Errors) {
    TestDisk disk(10 * block_bytes);
    EXPECT_TRUE(fails(digest_disk(disk, {.algorithm = "sha-none"}), Errc::invalid_argument, {"sha-none"}));
    EXPECT_TRUE(fails(digest_disk(disk, {.algorithm = "shake256"}), Errc::invalid_argument, {"fixed length"}));
    EXPECT_TRUE(fails(digest_size("sha-none"), Errc::invalid_argument));
    EXPECT_EQ(must(digest_size("SHA2-512")), 64U);
    must(disk.write({0}, std::vector<std::byte>(10 * block_bytes)));
    disk.bad_sector = 9 * block_bytes;
    EXPECT_TRUE(fails(digest_disk(disk), Errc::io));
    EXPECT_TRUE(fails(digest({.image = {.location = {.path = "/absent"}}}), Errc::not_found));
}

TEST(Digest, TellsItsProgressAndIsCancelled) {
    auto random = Random::named("digest");
    TestDisk disk(256 * block_bytes);
    disk.fill(random);
    for (std::uint64_t at = 0; at < 16 * block_bytes; at += block_bytes) disk.punch(at);
    for (const bool stops : {false, true}) {
        std::stop_source stop;
        DigestOptions options{.workers = 2};
        options.control.stop = stop.get_token();
        std::uint64_t last = 0;
        options.control.progress = [&](std::uint64_t done, std::uint64_t total) {
            EXPECT_GT(done, last);
            EXPECT_EQ(total, 256 * block_bytes);
            last = done;
            if (stops) stop.request_stop();
        };
        const auto result = digest_disk(disk, options);
        if (stops) {
            EXPECT_TRUE(fails(result, Errc::cancelled));
            EXPECT_LT(last, 128 * block_bytes);
        } else {
            EXPECT_EQ(must(result).size(), 32U);
            EXPECT_EQ(last, 256 * block_bytes);
        }
    }
}

}  // namespace
}  // namespace qcow
#endif
