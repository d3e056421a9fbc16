// Disks of virtual machines by vhost-user-blk, with a front end in place of the machine. What qemu-storage-daemon can
// do is expected of it, too, which shows that the front end is right.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/socket.h>

#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "engine/workload.h"
#include "qcow/vhost_user.h"
#include "server/guest_disk.h"
#include "server/nbd_client.h"
#include "server/test_disk.h"
#include "support/effort.h"
#include "support/random.h"
#include "support/result.h"
#include "support/temporary_directory.h"
#include "support/vhost/mixture.h"

namespace qcow::test {
namespace {

using front::bit;
using front::FrontEnd;
using front::Mixture;
using front::MixtureOptions;
using front::Options;
using front::Segment;
using std::chrono::milliseconds;

namespace feature = front::feature;
namespace protocol = front::protocol;

constexpr std::uint64_t KB = 1024;
constexpr std::uint64_t MB = 1024 * KB;
constexpr std::uint8_t ok = VIRTIO_BLK_S_OK;
constexpr std::uint8_t failed = VIRTIO_BLK_S_IOERR;
constexpr std::uint8_t unsupported = VIRTIO_BLK_S_UNSUPP;
constexpr std::uint32_t in = VIRTIO_BLK_T_IN;
constexpr std::uint32_t out = VIRTIO_BLK_T_OUT;

Bytes read_sectors(FrontEnd& front, std::uint64_t sector, std::uint64_t count, unsigned queue = 0) {
    Bytes result(count * sector_bytes);
    EXPECT_EQ(front.read(sector, result, queue), ok);
    return result;
}

/// Writes through each queue, and reads through another.
void expect_works(FrontEnd& front, Value value = 7) {
    for (unsigned i = 0; i < front.queues(); ++i) {
        const auto sector = 100 * std::uint64_t{i};
        const auto bytes = stamped(sector, 16, value + i);
        ASSERT_EQ(front.write(sector, bytes, i), ok);
        ASSERT_EQ(read_sectors(front, sector, 16, (i + 1) % front.queues()), bytes);
    }
}

std::string name_of(Program program) { return program == Program::qcow ? "qcow" : "storage_daemon"; }

class VhostUserTest : public testing::TestWithParam<Program> {
protected:
    [[nodiscard]] bool is_ours() const { return GetParam() == Program::qcow; }
};

INSTANTIATE_TEST_SUITE_P(Both, VhostUserTest, testing::Values(Program::qcow, Program::storage_daemon),
                         [](const auto& parameter) { return name_of(parameter.param); });

TEST_P(VhostUserTest, WorksWithoutAnyFeature) {
    GuestDisk disk(GetParam());
    for (unsigned i = 0; i <= 32; ++i) {
        if ((feature::known & bit(i)) == 0 || bit(i) == feature::version_1) continue;
        SCOPED_TRACE("feature " + std::to_string(i));
        // Without the protocol's features there is one queue, that nobody enables.
        const bool bare = bit(i) == feature::protocol_features;
        FrontEnd front(disk.socket(), {.features = ~bit(i), .queues = bare ? 1U : 2U});
        front.start();
        EXPECT_FALSE(front.has(bit(i)));
        expect_works(front, i + 1);
    }
    for (unsigned i = 0; i <= 16; ++i) {
        if ((protocol::known & bit(i)) == 0) continue;
        SCOPED_TRACE("protocol feature " + std::to_string(i));
        FrontEnd front(disk.socket(), {.protocol_features = ~bit(i), .queues = 2});
        front.start();
        EXPECT_FALSE(front.has_protocol(bit(i)));
        expect_works(front, i + 40);
    }
    FrontEnd front(disk.socket(), {.features = feature::version_1, .protocol_features = 0});
    front.start();
    expect_works(front, 99);
}

TEST_P(VhostUserTest, ManyQueues) {
    GuestDisk disk(GetParam());
    for (unsigned queues = 1; queues <= 4; ++queues) {
        FrontEnd front(disk.socket(), {.queues = queues});
        EXPECT_EQ(front.queue_limit(), 4U);
        front.start();
        expect_works(front, 10 * queues);
    }
}

TEST_P(VhostUserTest, QueuesOfOtherSizes) {
    GuestDisk disk(GetParam());
    for (const auto size : std::initializer_list<std::uint16_t>{4, 16, 128, 1024}) {
        if (!is_ours() && size > 128) continue;
        FrontEnd front(disk.socket(), {.queue_size = size, .most_segments = 2U});
        front.start();
        // More often than the ring's indices go round.
        for (unsigned i = 0; i < 70; ++i) expect_works(front, i + 1);
    }
}

TEST_P(VhostUserTest, Configuration) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket());
    front.start();
    const auto config = front.config();
    EXPECT_EQ(config.capacity, 64 * MB / sector_bytes);
    EXPECT_EQ(config.blk_size, 512U);
    EXPECT_EQ(config.num_queues, 4U);
    EXPECT_EQ(config.seg_max, 126U);
    EXPECT_GE(config.max_discard_sectors, 1U);
    EXPECT_GE(config.max_discard_seg, 1U);
    EXPECT_GE(config.max_write_zeroes_sectors, 1U);
    EXPECT_GE(config.max_write_zeroes_seg, 1U);
    const auto needed = feature::size_max * is_ours() | feature::seg_max | feature::blk_size | feature::flush |
                        feature::topology | feature::config_wce | feature::mq | feature::discard |
                        feature::write_zeroes | feature::indirect | feature::event_idx | feature::log_all |
                        feature::protocol_features | feature::version_1;
    EXPECT_EQ(front.offered_features() & needed, needed);
    EXPECT_FALSE(front.has(feature::read_only));
    if (is_ours()) {
        EXPECT_EQ(front.offered_protocol_features() & protocol::known, protocol::known);
        EXPECT_EQ(config.wce, 1U);
        EXPECT_EQ(config.write_zeroes_may_unmap, 1U);
        EXPECT_EQ(config.size_max, MB);
        EXPECT_EQ(config.discard_sector_alignment, 128U);
        EXPECT_EQ(config.opt_io_size, 128U);
    }

    // A part of it, and what lies outside of it.
    const auto part = front.connection().ask(front::Message::get_config,
                                             front::payload(front::ConfigHeader{20, 4, 0}, std::uint32_t{0}));
    EXPECT_EQ(part.payload.size(), sizeof(front::ConfigHeader) + 4);
}

TEST_P(VhostUserTest, ModeOfTheCache) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket());
    front.start();
    front.set_writeback(false);
    EXPECT_EQ(front.config().wce, 0U);
    expect_works(front);
    front.set_writeback(true);
    EXPECT_EQ(front.config().wce, 1U);
    const auto capacity = std::uint64_t{1};
    if (is_ours()) {
        EXPECT_THROW(front.set_config(0, front::bytes_of(capacity)), front::Refused);
        EXPECT_EQ(front.config().capacity, 64 * MB / sector_bytes);
    }
}

TEST_P(VhostUserTest, Statuses) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket());
    front.start();
    const auto capacity = front.config().capacity;
    const auto data = front.scratch();
    const auto status = [&](std::uint32_t type, std::uint64_t sector, std::uint32_t length) {
        return front.request(type, sector, std::array{Segment{data, length}});
    };
    for (const auto type : {in, out}) {
        EXPECT_EQ(status(type, capacity - 1, 512), ok);
        EXPECT_EQ(status(type, capacity - 1, 1024), failed);
        EXPECT_EQ(status(type, capacity, 512), failed);
        EXPECT_EQ(status(type, ~std::uint64_t{0}, 512), failed);
        EXPECT_EQ(status(type, ~std::uint64_t{0} / 512, 1024), failed);
        EXPECT_EQ(status(type, 0, 511), failed);
        EXPECT_EQ(status(type, 0, 513), failed);
    }
    EXPECT_EQ(front.flush(), ok);
    EXPECT_EQ(status(VIRTIO_BLK_T_GET_ID, 0, 20), ok);
    for (const std::uint32_t type : {2U, 3U, 16U, 255U, 0x7fffffffU}) EXPECT_EQ(status(type, 0, 512), unsupported);
    using Range = virtio_blk_discard_write_zeroes;
    const auto clear = [&](std::uint32_t type, Range range) { return front.clear(type, std::array{range}); };
    for (const std::uint32_t type : {VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES}) {
        EXPECT_EQ(clear(type, {0, 128, 0}), ok);
        EXPECT_EQ(clear(type, {capacity, 8, 0}), failed);
        EXPECT_EQ(clear(type, {capacity - 8, 16, 0}), failed);
        EXPECT_EQ(clear(type, {~std::uint64_t{0}, 8, 0}), failed);
        EXPECT_EQ(clear(type, {0, ~std::uint32_t{0}, 0}), failed);
        EXPECT_EQ(clear(type, {0, 8, 2}), unsupported);
        EXPECT_EQ(status(type, 0, 15), failed);
    }
    EXPECT_EQ(clear(VIRTIO_BLK_T_DISCARD, {0, 128, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP}), unsupported);
    EXPECT_EQ(clear(VIRTIO_BLK_T_WRITE_ZEROES, {0, 128, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP}), ok);
    expect_works(front);
}

TEST_P(VhostUserTest, DiscardsAndZeroes) {
    GuestDisk disk(GetParam());
    {
        FrontEnd front(disk.socket());
        front.start();
        const auto data = stamped(0, 2048, 5);
        ASSERT_EQ(front.write(0, data), ok);
        using Range = virtio_blk_discard_write_zeroes;
        // Each cluster in its own way: kept, discarded, zeroes with unmap, zeroes without.
        ASSERT_EQ(front.clear(VIRTIO_BLK_T_DISCARD, std::array{Range{128, 128, 0}}), ok);
        ASSERT_EQ(
            front.clear(VIRTIO_BLK_T_WRITE_ZEROES, std::array{Range{256, 128, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP}}),
            ok);
        ASSERT_EQ(front.clear(VIRTIO_BLK_T_WRITE_ZEROES, std::array{Range{384, 128, 0}}), ok);
        EXPECT_EQ(read_sectors(front, 128, 384), Bytes(384 * sector_bytes));
        EXPECT_EQ(read_sectors(front, 512, 128), stamped(512, 128, 5));
        if (is_ours()) {
            ASSERT_EQ(front.clear(VIRTIO_BLK_T_WRITE_ZEROES, std::array{Range{640, 1, 0}, Range{642, 2, 0}}), ok);
            EXPECT_EQ(read_sectors(front, 640, 1), Bytes(sector_bytes));
            EXPECT_EQ(read_sectors(front, 641, 1), stamped(641, 1, 5));
        }
        ASSERT_EQ(front.flush(), ok);
    }
    disk.stop();
    std::vector<std::pair<bool, bool>> found;  // of clusters 0 to 4: data, allocated
    for (const auto& extent : qemu_img_json({"map", "--output=json", "-f", "qcow2", disk.image()})) {
        const std::uint64_t start = extent["start"];
        const std::uint64_t length = extent["length"];
        for (auto at = start; at < start + length && at < 5 * 64 * KB; at += 64 * KB)
            found.emplace_back(extent["data"], extent.contains("offset"));
    }
    using Pair = std::pair<bool, bool>;
    ASSERT_EQ(found.size(), 5U);
    EXPECT_EQ(found[0], Pair(true, true));
    EXPECT_FALSE(found[1].second);
    EXPECT_FALSE(found[2].second);
    EXPECT_EQ(found[3], Pair(false, true));
    EXPECT_EQ(found[4], Pair(true, true));
    EXPECT_EQ(qemu_check(disk.image(), false, {}).status, 0);
}

TEST_P(VhostUserTest, ReadOnly) {
    GuestDisk disk(GetParam());
    disk.restart_read_only();
    FrontEnd front(disk.socket());
    front.start();
    EXPECT_TRUE(front.has(feature::read_only));
    EXPECT_EQ(front.write(0, Bytes(512)), failed);
    EXPECT_EQ(read_sectors(front, 0, 1), Bytes(512));
    EXPECT_EQ(front.has(feature::discard), !is_ours());
    using Range = virtio_blk_discard_write_zeroes;
    EXPECT_EQ(front.clear(VIRTIO_BLK_T_WRITE_ZEROES, std::array{Range{0, 8, 0}}), failed);
}

TEST_P(VhostUserTest, RegionsOfMemory) {
    GuestDisk disk(GetParam());
    for (const bool one_by_one : {false, true}) {
        for (const bool indirect : {false, true}) {
            SCOPED_TRACE(testing::Message() << "one by one " << one_by_one << ", indirect " << indirect);
            FrontEnd front(disk.socket(), {.features = indirect ? ~std::uint64_t{0} : ~feature::indirect,
                                           .regions = {8 * MB, 64 * KB, 2 * MB},
                                           .regions_one_by_one = one_by_one});
            front.start();
            expect_works(front);
            // In each region, and over their boundaries. The storage daemon does not follow an indirect table over
            // more pieces than it has descriptors.
            const auto& regions = front.memory().regions();
            std::vector<std::uint64_t> places = {regions[1].guest, regions[2].guest + MB};
            if (is_ours() || !indirect)
                places.insert(places.end(), {regions[1].guest - 512, regions[1].guest - 100, regions[2].guest - 1024});
            for (const auto place : places) {
                const auto bytes = stamped(5000, 100, place);
                const std::array segments = {Segment{place, static_cast<std::uint32_t>(bytes.size())}};
                std::ranges::copy(bytes, front.memory().at(place));
                ASSERT_EQ(front.request(out, 5000, segments), ok);
                ASSERT_EQ(read_sectors(front, 5000, 100), bytes);
                std::ranges::fill(front.memory().bytes(place, bytes.size()), std::byte{0});
                ASSERT_EQ(front.request(in, 5000, segments), ok);
                ASSERT_TRUE(std::ranges::equal(front.memory().bytes(place, bytes.size()), bytes));
            }
        }
    }
}

TEST_P(VhostUserTest, ManySegments) {
    GuestDisk disk(GetParam());
    for (const bool indirect : {false, true}) {
        FrontEnd front(disk.socket(), {.features = indirect ? ~std::uint64_t{0} : ~feature::indirect});
        front.start();
        std::vector<Segment> segments;
        const auto bytes = stamped(0, 126 * 8, 3);
        std::ranges::copy(bytes, front.memory().at(front.scratch()));
        for (std::uint64_t i = 0; i < 126; ++i) segments.push_back({front.scratch() + i * 4096, 4096});
        ASSERT_EQ(front.request(out, 0, segments), ok);
        ASSERT_EQ(read_sectors(front, 0, 126 * 8), bytes);
        // Parts of odd sizes, in another order.
        segments = {{front.scratch() + 4096, 1}, {front.scratch() + 1, 1022}, {front.scratch() + 9001, 1}};
        ASSERT_EQ(front.request(in, 8, segments), ok);
        ASSERT_EQ(front.memory().at(front.scratch())[4096], stamped(8, 2, 3)[0]);
        ASSERT_EQ(front.memory().at(front.scratch())[9001], stamped(8, 2, 3)[1023]);
    }
}

TEST_P(VhostUserTest, Reconnects) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket(), {.queues = 2});
    front.start();
    for (unsigned i = 1; i < 10; ++i) {
        expect_works(front, i);
        if (i % 2 == 0) {
            for (unsigned queue = 0; queue < 2; ++queue)
                EXPECT_EQ(front.stop_queue(queue), front.queue(queue).used_index());
        }
        front.reconnect();
        EXPECT_EQ(read_sectors(front, 0, 16), stamped(0, 16, i));
    }
    disk.stop();
    disk.start();
    front.reconnect();
    EXPECT_EQ(read_sectors(front, 0, 16), stamped(0, 16, 9));
}

TEST_P(VhostUserTest, StopsAndStartsQueues) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket(), {.queues = 2});
    front.start();
    for (unsigned i = 0; i < 5; ++i) {
        expect_works(front, i + 1);
        EXPECT_EQ(front.stop_queue(0), front.queue(0).used_index());
        // Nothing is done meanwhile, and everything afterwards.
        const std::array segments = {Segment{front.scratch(), 512}};
        ASSERT_TRUE(front.queue(0).submit(in, 0, segments));
        front.queue(0).publish();
        EXPECT_EQ(read_sectors(front, 0, 16, 1), stamped(0, 16, i + 1));
        EXPECT_FALSE(front.queue(0).poll());
        front.start_queue(0);
        EXPECT_EQ(front.queue(0).wait().status, ok);
    }
}

TEST_P(VhostUserTest, LogOfChangedPages) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket());
    front.start();
    ASSERT_EQ(front.write(0, stamped(0, 64, 1)), ok);
    front.start_log();
    auto& memory = front.memory();
    const auto page = [](std::uint64_t address) { return address / front::page_bytes; };
    const auto dirty_pages = [&] {
        std::set<std::uint64_t> pages;
        for (std::uint64_t at = 0; at < memory.end(); at += front::page_bytes) {
            if (front.is_dirty(at)) pages.insert(page(at));
        }
        return pages;
    };
    const auto used = page(front.queue(0).used_address());
    // A read changes the pages of its data, the status and the used ring.
    const auto data = memory.allocate(16 * front::page_bytes, front::page_bytes);
    ASSERT_EQ(front.request(in, 0, std::array{Segment{data + 100, 4096}, Segment{data + 5 * 4096, 512}}), ok);
    auto pages = dirty_pages();
    EXPECT_TRUE(pages.contains(used));
    EXPECT_TRUE(pages.contains(page(data)));
    EXPECT_TRUE(pages.contains(page(data) + 1));
    EXPECT_TRUE(pages.contains(page(data) + 5));
    EXPECT_FALSE(pages.contains(page(data) + 2));
    EXPECT_LE(pages.size(), 6U);

    // A write changes no data.
    front.clear_log();
    ASSERT_EQ(front.request(out, 0, std::array{Segment{data + 8 * 4096, 4096}}), ok);
    pages = dirty_pages();
    EXPECT_TRUE(pages.contains(used));
    EXPECT_FALSE(pages.contains(page(data) + 8));

    front.stop_log();
    front.clear_log();
    ASSERT_EQ(front.request(in, 0, std::array{Segment{data, 4096}}), ok);
    EXPECT_THAT(dirty_pages(), testing::IsEmpty());
}

/// Requests of random places, with everything that changes in memory held against the log.
TEST_P(VhostUserTest, LogMissesNothing) {
    GuestDisk disk(GetParam());
    FrontEnd front(disk.socket());
    front.start();
    ASSERT_EQ(front.write(0, stamped(0, 2048, 1)), ok);
    front.start_log();
    auto random = Random::named("log");
    auto& memory = front.memory();
    const auto data = memory.allocate(MB, front::page_bytes);
    auto& queue = front.queue(0);
    const auto first = queue.descriptors_address() / front::page_bytes * front::page_bytes;
    for (int round = 0; round < 20; ++round) {
        std::ranges::fill(memory.bytes(data, MB), std::byte{0xee});
        for (int i = 0; i < 8; ++i) {
            const auto sectors = random.between(1, 32);
            const auto at = data + random.below(MB - sectors * sector_bytes);
            ASSERT_TRUE(queue.submit(in, random.below(2000),
                                     std::array{Segment{at, static_cast<std::uint32_t>(sectors * sector_bytes)}}));
        }
        front.clear_log();
        const Bytes before(memory.at(first), memory.at(memory.end()));
        queue.publish();
        for (int i = 0; i < 8; ++i) ASSERT_EQ(queue.wait().status, ok);
        const auto own = queue.available_address() / front::page_bytes * front::page_bytes;
        for (auto at = first; at < memory.end(); at += front::page_bytes) {
            if (at == own) continue;
            const auto now = memory.bytes(at, front::page_bytes);
            const bool changed = !std::ranges::equal(now, std::span(before).subspan(at - first, front::page_bytes));
            ASSERT_TRUE(!changed || front.is_dirty(at)) << "page " << at / front::page_bytes;
        }
    }
}

TEST_P(VhostUserTest, MixtureOfManyJobs) {
    GuestDisk disk(GetParam());
    MixtureOptions options{.bytes = 64 * MB, .seed = run_seed()};
    // The storage daemon loses data when discards and writes of the same clusters overlap.
    if (!is_ours()) options.clears = 0;
    FrontEnd front(disk.socket(), {.queues = 4, .regions = {Mixture::memory_needed(options) + 40 * MB}});
    front.start();
    Mixture mixture(front, options);
    const auto end = std::chrono::steady_clock::now() + milliseconds(1500) * effort();
    mixture.run([&] { return std::chrono::steady_clock::now() > end; });
    mixture.verify();
    std::cout << mixture.counts() << "\n";
    for (unsigned i = 0; i < 4; ++i) front.stop_queue(i);
    disk.stop();
    EXPECT_EQ(qemu_check(disk.image(), false, {}).status, 0);
}

// ---- Of qcow alone ----

TEST(GuestDiskTest, SerialNumberAndBlockSize) {
    GuestDisk disk(Program::qcow, "64M", 2, {"--serial", "disk 17", "--block-size", "4096"});
    FrontEnd front(disk.socket());
    front.start();
    std::ranges::fill(front.memory().bytes(front.scratch(), 20), std::byte{1});
    ASSERT_EQ(front.request(VIRTIO_BLK_T_GET_ID, 0, std::array{Segment{front.scratch(), 20}}), ok);
    const std::string id(reinterpret_cast<const char*>(front.memory().at(front.scratch())), 20);
    EXPECT_EQ(id, std::string("disk 17") + std::string(13, '\0'));
    EXPECT_EQ(front.request(VIRTIO_BLK_T_GET_ID, 0, std::array{Segment{front.scratch(), 19}}), failed);
    EXPECT_EQ(front.config().blk_size, 4096U);
    EXPECT_EQ(front.config().physical_block_exp, 0U);
    EXPECT_EQ(front.write(8, Bytes(4096)), ok);
    EXPECT_EQ(front.write(8, Bytes(512)), failed);
    EXPECT_EQ(front.write(1, Bytes(4096)), failed);
}

TEST(GuestDiskTest, SizeOfTheQueueAndPolling) {
    GuestDisk disk(Program::qcow, "64M", 3, {"--queue-size", "256", "--poll-us", "100"});
    FrontEnd front(disk.socket(), {.queues = 3, .queue_size = 256});
    front.start();
    EXPECT_EQ(front.config().seg_max, 254U);
    EXPECT_EQ(front.config().num_queues, 3U);
    EXPECT_EQ(front.queue_limit(), 3U);
    for (unsigned i = 0; i < 100; ++i) expect_works(front, i + 1);
}

TEST(GuestDiskTest, SocketOfAServiceManager) {
    const TemporaryDirectory directory;
    must_qemu_img({"create", "-q", "-f", "qcow2", "a.qcow2", "16M"}, directory.path());
    const auto* const manager =
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.bind('a')\n"
        "s.listen()\n"
        "os.dup2(s.fileno(), 3)\n"
        "os.set_inheritable(3, True)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n";
    Subprocess server({"python3", "-c", manager, QCOW_TOOL, "serve", "--vhost-user", "fd:3", "a.qcow2"},
                      directory.path());
    {
        FrontEnd front(directory / "a");
        front.start();
        expect_works(front);
    }
    EXPECT_EQ(server.finish().status, 0);
}

TEST(GuestDiskTest, Snapshot) {
    GuestDisk disk(Program::qcow);
    {
        FrontEnd front(disk.socket());
        front.start();
        expect_works(front, 1);
    }
    disk.stop();
    must_qemu_img({"snapshot", "-c", "one", disk.image()});
    must_qemu_io(disk.image(), "qcow2", {"write -P 9 0 64k"});
    disk.start();
    disk.restart({"--snapshot", "one"});
    FrontEnd front(disk.socket());
    front.start();
    EXPECT_TRUE(front.has(feature::read_only));
    EXPECT_EQ(read_sectors(front, 0, 16), stamped(0, 16, 1));
    EXPECT_EQ(front.write(0, Bytes(512)), failed);
}

TEST(GuestDiskTest, AnnouncesItsSize) {
    GuestDisk disk(Program::qcow, "64M", 2, {"--control", "control"});
    FrontEnd front(disk.socket());
    front.start();
    const auto resize = [&](const std::string& size) {
        must_run({QCOW_TOOL, "control", "control", "block_resize", "size=" + size}, disk.directory().path());
    };
    resize("83886080");
    ASSERT_TRUE(front.wait_for_config_change());
    EXPECT_EQ(front.config().capacity, 80 * MB / sector_bytes);
    EXPECT_EQ(front.write(80 * MB / sector_bytes - 1, Bytes(512)), ok);
    // Other commands do not change it.
    must_run({QCOW_TOOL, "control", "control", "query-named-block-nodes"}, disk.directory().path());
    EXPECT_FALSE(front.wait_for_config_change(milliseconds(50)));
}

TEST(GuestDiskTest, SeveralImagesBesideNbd) {
    const TemporaryDirectory directory;
    for (const std::string name : {"a", "b"})
        must_qemu_img({"create", "-q", "-f", "qcow2", name + ".qcow2", "16M"}, directory.path());
    Subprocess server({QCOW_TOOL, "serve", "--vhost-user", "a", "--vhost-user", "b", "--socket", "nbd", "--export-name",
                       "a", "--export-name", "b", "--persistent", "a.qcow2", "b.qcow2"},
                      directory.path());
    FrontEnd a(directory / "a");
    FrontEnd b(directory / "b");
    a.start();
    b.start();
    expect_works(a, 1);
    expect_works(b, 2);
    EXPECT_EQ(read_sectors(a, 0, 16), stamped(0, 16, 1));
    NbdClient client(directory / "nbd");
    client.go(nbd::Style::structured, {}, "b");
    EXPECT_EQ(client.read(0, 16 * sector_bytes).bytes, stamped(0, 16, 2));
    EXPECT_EQ(client.write(0, stamped(0, 16, 3)), 0U);
    EXPECT_EQ(read_sectors(b, 0, 16), stamped(0, 16, 3));
    server.signal(SIGTERM);
    EXPECT_EQ(server.finish().status, 0);
}

TEST(GuestDiskTest, EndsWithTheLastMachine) {
    const TemporaryDirectory directory;
    must_qemu_img({"create", "-q", "-f", "qcow2", "a.qcow2", "16M"}, directory.path());
    Subprocess server({QCOW_TOOL, "serve", "--vhost-user", "a", "a.qcow2"}, directory.path());
    {
        FrontEnd front(directory / "a");
        front.start();
        expect_works(front);
    }
    EXPECT_EQ(server.finish().status, 0);
    EXPECT_FALSE(std::filesystem::exists(directory / "a"));
}

TEST(GuestDiskTest, StatusOfTheDevice) {
    GuestDisk disk;
    FrontEnd front(disk.socket());
    front.start();
    constexpr std::uint64_t driver_ok = 0xf;
    front.set(front::Message::set_status, front::bytes_of(driver_ok));
    EXPECT_EQ(front.connection().ask_number(front::Message::get_status), driver_ok);
    expect_works(front);
    // A driver that starts again. QEMU asks afterwards where the rings were.
    const auto used = front.queue(0).used_index();
    EXPECT_GT(used, 0U);
    front.set(front::Message::set_status, front::bytes_of(std::uint64_t{0}));
    EXPECT_EQ(front.connection().ask_number(front::Message::get_status), 0U);
    EXPECT_EQ(front.stop_queue(0), used);
}

/// The guest learns only that there is an error.
TEST(GuestDiskTest, ErrorsOfTheDiskAreSaidOnce) {
    const TemporaryDirectory directory;
    const auto disk = std::make_shared<TestDisk>(MiB);
    disk->bad_sector = 8 * sector_bytes;
    std::mutex mutex;
    std::vector<std::string> said;
    VhostUserOptions options{.queues = 1, .persistent = false};
    options.complain = [&](const std::string& text) {
        const std::lock_guard lock(mutex);
        said.push_back(text);
    };
    const auto server = must(VhostUserServer::make(disk, options));
    must(server->listen_unix(directory / "socket"));
    std::jthread running([&] { must(server->run()); });
    {
        FrontEnd front(directory / "socket");
        front.start();
        const std::array data{Segment{front.scratch(), 512}};
        for (const auto type : {in, out, in}) EXPECT_EQ(front.request(type, 8, data), failed);
        EXPECT_EQ(front.request(in, 9, data), ok);
    }
    running.join();
    ASSERT_EQ(said.size(), 1U);
    EXPECT_NE(said.front(), "");
}

}  // namespace
}  // namespace qcow::test
