// What the disk of a virtual machine says of its cache, and does.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "server/guest_disk.h"
#include "support/subprocess.h"

namespace qcow::test {
namespace {

using front::FrontEnd;
using front::Segment;

TEST(GuestCacheTest, KeepsTheModeOfTheCacheWhenALogStarts) {
    GuestDisk disk;
    FrontEnd front(disk.socket());
    front.start();
    front.set_writeback(false);
    front.start_log();
    EXPECT_EQ(front.config().wce, 0U);
    front.stop_log();
    EXPECT_EQ(front.config().wce, 0U);
}

/// Drivers read it before they accept features, and believe it then.
TEST(GuestCacheTest, IsCachedBeforeFeaturesAreAccepted) {
    GuestDisk disk;
    FrontEnd front(disk.socket());
    front.set(front::Message::set_features, front::bytes_of(std::uint64_t{0}));
    EXPECT_EQ(front.config().wce, 1U);
}

TEST(GuestCacheTest, WhoCannotFlushHasEachWriteFlushed) {
    GuestDisk disk;
    FrontEnd front(disk.socket(), {.features = ~front::feature::flush});
    front.start();
    const auto data = front.scratch();
    std::ranges::fill(front.memory().bytes(data, 4096), std::byte{7});
    EXPECT_EQ(front.request(VIRTIO_BLK_T_OUT, 64, std::array{Segment{data, 4096}}), VIRTIO_BLK_S_OK);
    disk.kill();
    EXPECT_EQ(must_run({QCOW_TOOL, "read", disk.image(), "32k", "4k"}).out, std::string(4096, '\7'));
}

}  // namespace
}  // namespace qcow::test
