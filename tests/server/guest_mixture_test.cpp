// Mixtures of requests by many jobs at once: while the server is killed, and on a large overlay with snapshots.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <fstream>
#include <thread>

#include "base/bits.h"
#include "engine/workload.h"
#include "server/guest_disk.h"
#include "support/effort.h"
#include "support/random.h"
#include "support/vhost/mixture.h"

namespace qcow::test {
namespace {

using front::FrontEnd;
using front::Mixture;
using front::MixtureOptions;
using std::chrono::milliseconds;

TEST(GuestDiskTest, GoesOnWithWhatWasInFlightWhenTheConnectionIsLost) {
    GuestDisk disk;
    // Large requests are completed out of their order.
    MixtureOptions options{.bytes = 64 * MiB, .jobs = 8, .depth = 16, .longest = 64, .seed = run_seed()};
    FrontEnd front(disk.socket(), {.queues = 2, .regions = {Mixture::memory_needed(options) + 20 * MiB}});
    front.start();
    Mixture mixture(front, options);
    for (unsigned i = 0; i < 5; ++i) {
        std::thread breaker([&] {
            std::this_thread::sleep_for(milliseconds(60));
            shutdown(front.connection().fd(), SHUT_RDWR);
        });
        EXPECT_THROW(mixture.run([] { return false; }), front::Disconnected);
        breaker.join();
        front.reconnect();
    }
    mixture.finish();
    mixture.verify();
}

/// Hashes of what these bytes of the disk hold, one for each piece.
std::vector<std::size_t> hashes(FrontEnd& front, const MixtureOptions& options) {
    std::vector<std::size_t> result;
    Bytes bytes(std::min(MiB, options.spread.area));
    for (std::uint64_t at = 0; at < options.bytes; at += bytes.size()) {
        if (front.read(options.spread.place(at) / sector_bytes, bytes) != VIRTIO_BLK_S_OK)
            throw std::runtime_error("the disk cannot be read");
        const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        result.push_back(std::hash<std::string_view>()(text));
    }
    return result;
}

/// A mixture that changes more pages of L2 tables than the cache holds. The tables are there for all of the disk.
/// QCOW_EFFORT makes it longer and the tables larger, up to 3.75 GiB of them: see make soak-guest.
struct WarmOverlay {
    bool is_long = effort() > 10;
    std::chrono::seconds length = std::chrono::seconds(6) * effort();
    MixtureOptions options = {.bytes = (is_long ? 15360 : 5120) * 64 * KiB,
                              .spread = {.area = 64 * KiB, .stride = is_long ? 1024 * MiB : 16 * MiB},
                              .seed = run_seed()};
    std::uint64_t disk_bytes = options.spread.place(options.bytes);

    /// Makes a compressed base, and `image` over it.
    void make(const std::string& image, const std::string& directory) const {
        {
            std::ofstream raw(directory + "/base.raw", std::ios::binary);
            for (std::uint64_t at = 0; at < options.bytes; at += options.spread.area) {
                const auto bytes = stamped(at / sector_bytes, options.spread.area / sector_bytes, 1);
                raw.seekp(static_cast<std::streamoff>(options.spread.place(at)));
                raw.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
            }
        }
        std::filesystem::resize_file(directory + "/base.raw", disk_bytes);
        must_run({QCOW_TOOL, "convert", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "base.raw", "base.qcow2"},
                 directory);
        std::filesystem::remove(directory + "/base.raw");
        must_run({QCOW_TOOL, "create", "-q", "-o", "extended_l2=on,preallocation=metadata", "-b", "base.qcow2", "-F",
                  "qcow2", image},
                 directory);
    }
};

/// What a server is killed on.
struct KilledDisk {
    std::string name;
    bool writeback = true;
    bool overlay = false;  // over a compressed image, and snapshots come and go
};

void PrintTo(const KilledDisk& disk, std::ostream* out) { *out << disk.name; }

/// The same rings and memory after the server was killed under load: each request completes once, and nothing that was
/// complete is lost, flushed or not.
class KilledGuestDiskTest : public testing::TestWithParam<KilledDisk> {};

INSTANTIATE_TEST_SUITE_P(Modes, KilledGuestDiskTest,
                         testing::Values(KilledDisk{"writeback"}, KilledDisk{"writethrough", false},
                                         KilledDisk{"overlay", true, true}),
                         [](const auto& parameter) { return parameter.param.name; });

TEST_P(KilledGuestDiskTest, GoesOnWithWhatWasInFlight) {
    const auto& kind = GetParam();
    GuestDisk disk;
    // Large requests are completed out of their order.
    MixtureOptions options{.bytes = 64 * MiB, .jobs = 8, .depth = 16, .longest = 64, .seed = run_seed()};
    if (kind.overlay) {
        WarmOverlay overlay;
        overlay.options.bytes = 128 * overlay.options.spread.area;
        disk.stop();
        std::filesystem::remove(disk.image());
        overlay.make(disk.image(), disk.directory().path());
        options.bytes = overlay.options.bytes;
        options.spread = overlay.options.spread;
        disk.start_with({"--control", "control"});
    }
    FrontEnd front(disk.socket(), {.queues = 2, .regions = {Mixture::memory_needed(options) + 20 * MiB}});
    front.start();
    ASSERT_TRUE(front.has_protocol(front::protocol::inflight_shmfd));
    Mixture mixture(front, options);
    front.set_writeback(kind.writeback);
    auto random = Random::named("killed guest disk");
    unsigned snapshots = 0;
    for (unsigned kill = 0; kill < rounds(12); ++kill) {
        std::thread killer([&, delay = random.below(150)] {
            if (kind.overlay) {
                Subprocess snapshot({QCOW_TOOL, "snapshot", "--control", "control", "-c", std::to_string(kill)},
                                    disk.directory().path());
                // Half of the servers are killed while they make it.
                if (kill % 2 == 0) snapshots += snapshot.finish().status == 0 ? 1U : 0U;
                std::this_thread::sleep_for(milliseconds(random.below(60)));
                disk.kill();
                if (kill % 2 != 0) snapshot.finish();
                return;
            }
            std::this_thread::sleep_for(milliseconds(delay));
            disk.kill();
        });
        EXPECT_THROW(mixture.run([] { return false; }), front::Disconnected);
        killer.join();
        disk.start();
        // The snapshot has to wait for what the guest has written.
        std::optional<Subprocess> early;
        const Arguments make_early = {QCOW_TOOL, "snapshot", "--control",
                                      "control", "-c",       fmt::format("early{}", kill)};
        if (kind.overlay) early.emplace(make_early, disk.directory().path());
        std::this_thread::sleep_for(milliseconds(kind.overlay ? random.below(50) : 0));
        front.reconnect();  // and nobody says again how it is cached
        EXPECT_TRUE(!early || early->finish().status == 0);
        mixture.finish();
        mixture.verify();
    }
    std::cout << mixture.counts() << ", " << snapshots << " snapshots\n";
    EXPECT_TRUE(!kind.overlay || snapshots > 0);
    for (unsigned i = 0; i < 2; ++i) front.stop_queue(i);
    disk.stop();
    const auto status = qemu_check(disk.image(), false, {}).status;
    EXPECT_TRUE(status == 0 || status == 3) << status;
}

/// Four queues of an overlay over a compressed image, of which a snapshot is made, and another one removed, again and
/// again.
TEST(GuestDiskTest, MixtureOnAnOverlayWithSnapshots) {
    const WarmOverlay overlay;
    const auto& options = overlay.options;
    GuestDisk disk(Program::qcow, "1M");
    disk.stop();
    const auto& directory = disk.directory();
    std::filesystem::remove(disk.image());
    overlay.make(disk.image(), directory.path());
    const auto base = must_run({"sha256sum", "base.qcow2"}, directory.path()).out;
    disk.start_with({"--control", "control"});

    FrontEnd front(disk.socket(), {.queues = 4, .regions = {Mixture::memory_needed(options) + 40 * MiB}});
    front.start();
    // A part of every area is the overlay's.
    for (std::uint64_t at = 0; at < options.bytes; at += options.spread.area)
        ASSERT_EQ(front.write(options.spread.place(at) / sector_bytes, stamped(at / sector_bytes, 8, 2)),
                  VIRTIO_BLK_S_OK);

    Mixture mixture(front, options);
    const auto end = std::chrono::steady_clock::now() + overlay.length;
    const auto command = [&](const std::string& name, const std::string& snapshot) {
        must_run({QCOW_TOOL, "control", "control", name, "name=" + snapshot}, directory.path());
    };
    unsigned snapshots = 0;
    std::atomic<bool> stop = false;
    std::optional<std::string> refused;
    const auto keep_snapshots = [&] {
        const auto name = [](unsigned number) { return "snapshot-" + std::to_string(number); };
        while (!stop) {
            command("blockdev-snapshot-internal-sync", name(snapshots));
            if (snapshots >= 2) command("blockdev-snapshot-delete-internal-sync", name(snapshots - 2));
            ++snapshots;
            for (int i = 0; i < 100 && !stop; ++i) std::this_thread::sleep_for(milliseconds(10));
        }
    };
    std::thread keeper([&] {
        try {
            keep_snapshots();
        } catch (const std::exception& error) {
            refused = error.what();
        }
    });
    std::optional<std::string> wrong;
    std::vector<std::size_t> last;
    try {
        mixture.run([&] { return std::chrono::steady_clock::now() > end; });
        stop = true;
        keeper.join();
        // A snapshot whose contents are known, and changes after it.
        last = hashes(front, options);
        command("blockdev-snapshot-internal-sync", "last");
        const auto later = std::chrono::steady_clock::now() + milliseconds(500);
        mixture.run([&] { return std::chrono::steady_clock::now() > later; });
        mixture.verify();
    } catch (const std::exception& error) {
        wrong = error.what();
    }
    stop = true;
    if (keeper.joinable()) keeper.join();
    ASSERT_FALSE(wrong) << *wrong << "\n" << replay_hint();
    ASSERT_FALSE(refused) << *refused;
    std::cout << mixture.counts() << ", " << snapshots << " snapshots\n";
    for (unsigned i = 0; i < 4; ++i) front.stop_queue(i);

    disk.restart({"--snapshot", "last"});
    FrontEnd snapshot(disk.socket());
    snapshot.start();
    EXPECT_TRUE(hashes(snapshot, options) == last);
    disk.stop();
    must_run({QCOW_TOOL, "check", disk.image()});
    EXPECT_EQ(qemu_check(disk.image(), false, {}).status, 0);
    EXPECT_EQ(must_run({"sha256sum", "base.qcow2"}, directory.path()).out, base);
}

}  // namespace
}  // namespace qcow::test
