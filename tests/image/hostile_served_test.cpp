// Images that mean harm, served to clients that do, too.

#include "hostile.h"
#include "server/running_server.h"

namespace qcow::hostile {
namespace {

using nbd::Command;

/// A disk of 2 PiB in 34 thousand million extents: four million times the same L2 table, in which every other cluster
/// is zero and the rest are not allocated. To clients all of that is one hole.
std::shared_ptr<Image> endless_hole() {
    HostileImage image;
    image.size = bit(51);
    image.l1_entries = bit(22);
    image.fill(image.cluster(3), bit(22), image.cluster(600));
    Bytes table(64 * KiB);
    for (std::size_t i = 0; i < table.size(); i += 16) store_be<std::uint64_t>(table, i, 1);
    image.file.segments.push_back({image.cluster(600), std::move(table)});
    const auto opened = open_bounded(image.finish(601));
    EXPECT_TRUE(opened.has_value());
    return opened ? *opened : nullptr;
}

TEST_F(Hostile, StatusOfAnEndlessHole) {
    const auto disk = endless_hole();
    test::RunningServer server({{"", "", disk, true}});
    test::NbdClient client(server.socket());
    client.go(nbd::Style::extended, {"base:allocation"});
    const auto begin = std::chrono::steady_clock::now();
    client.send(client.request(Command::block_status, 0, disk->size()));
    const auto answer = client.chunk();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::duration<double>(max_seconds));
    ASSERT_EQ(answer.type, nbd::chunk_type::block_status_ext);
    ASSERT_EQ(answer.data.size(), 8 + 16U);
    EXPECT_GT(load_be<std::uint64_t>(answer.data, 8), GiB / 4);
    EXPECT_LT(load_be<std::uint64_t>(answer.data, 8), disk->size());

    // Nobody waits for what a client has asked for that is gone.
    for (int i = 0; i < 100; ++i) client.send(client.request(Command::block_status, 0, disk->size()));
    client.hang_up();
    EXPECT_TRUE(test::must_stop(server));
}

}  // namespace
}  // namespace qcow::hostile
