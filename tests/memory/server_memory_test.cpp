// Memory runs out in the server: it may let go of that client, and everybody else is served.

#include <gtest/gtest.h>

#include <functional>
#include <latch>

#include "memory/shortage.h"
#include "server/nbd/connection.h"
#include "server/nbd/session.h"
#include "server/nbd_client.h"
#include "server/test_disk.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

using nbd::Command;
using nbd::Option;

/// A client that has said everything before it listens.
class EagerClient final : public Stream {
public:
    explicit EagerClient(Bytes says) : says_(std::move(says)) {}

    std::size_t receive(std::span<std::byte> to) override {
        const auto count = ended_ ? 0 : std::min(to.size(), says_.size() - taken_);
        if (count == 0) {
            listens_ = true;
            listens_.notify_all();
        }
        std::copy_n(says_.begin() + static_cast<std::ptrdiff_t>(taken_), count, to.begin());
        taken_ += count;
        return count;
    }
    bool send(std::span<const std::byte> bytes) override {
        if (!ended_) heard_ += bytes.size();
        return !ended_;
    }
    void wait_forever() override {}
    void shutdown() override { ended_ = true; }

    [[nodiscard]] bool ended() const { return ended_; }
    [[nodiscard]] std::size_t heard() const { return heard_; }

    /// Until everything was said, and what was ready heard.
    void wait_until_it_listens() const { listens_.wait(false); }

private:
    std::atomic<bool> listens_ = false;
    Bytes says_;
    std::size_t taken_ = 0;
    std::atomic<bool> ended_ = false;
    std::atomic<std::size_t> heard_ = 0;
};

Wire option(Option option, const Bytes& data) {
    Wire wire;
    wire << nbd::option_magic << static_cast<std::uint32_t>(option) << static_cast<std::uint32_t>(data.size()) << data;
    return wire;
}

Wire request(Command command, std::uint64_t offset, std::uint32_t length) {
    Wire wire;
    wire << std::uint32_t{0x25609513} << std::uint16_t{0} << static_cast<std::uint16_t>(command) << std::uint64_t{7}
         << offset << length;
    return wire;
}

Bytes handshake(nbd::Style style = nbd::Style::structured) {
    Wire says;
    says << std::uint32_t{3};
    if (style == nbd::Style::simple) {
        says << option(Option::go, NbdClient::go_data("")).bytes;
        return says.bytes;
    }
    says << option(Option::structured_reply, {}).bytes;
    says << option(Option::list, {}).bytes;
    says << option(Option::set_meta_context, NbdClient::query_data("", {"base:allocation"})).bytes;
    says << option(Option::go, NbdClient::go_data("")).bytes;
    return says.bytes;
}

std::vector<NbdExport> exports_of(std::shared_ptr<Disk> disk) {
    NbdExport exported;
    exported.disk = std::move(disk);
    return {exported};
}

/// As the server does it.
std::vector<NbdExport> with_contexts(std::vector<NbdExport> exports) {
    for (auto& exported : exports) exported.contexts = nbd::built_in_contexts(exported);
    return exports;
}

TEST(ServerMemory, EachAllocationMayFail) {
    Wire says;
    says << handshake() << request(Command::write, 4096, 512).bytes << Bytes(512);
    says << request(Command::write, 0, 1 << 20).bytes << Bytes(std::size_t{1} << 20);
    says << request(Command::read, 0, 3 << 20).bytes << request(Command::block_status, 0, 3 << 20).bytes;
    says << request(Command::flush, 0, 0).bytes << request(Command::disconnect, 0, 0).bytes;
    const auto exports = with_contexts(exports_of(std::make_shared<TestDisk>(std::uint64_t{4} << 20)));

    std::size_t everything = 0;
    std::uint64_t failed = 0;
    for (std::uint64_t n = 0;; ++n) {
        EagerClient client(says.bytes);
        shortage = {.after = n};
        {
            const Works server(true);
            ASSERT_NO_THROW(nbd::serve_client(client, exports, {.workers = 0})) << "allocation " << n;
        }
        EXPECT_TRUE(client.ended());
        if (shortage.hits == 0) {
            everything = client.heard();
            break;
        }
        ++failed;
    }
    shortage = {};
    EXPECT_GT(everything, std::size_t{3} << 20);
    EXPECT_GT(failed, 10U);
}

/// Does what a test wants when it is read.
class EventfulDisk final : public Disk {
public:
    explicit EventfulDisk(std::function<void(bool by_crew, GuestOffset at)> on_read) : on_read_(std::move(on_read)) {}

    [[nodiscard]] std::uint64_t size() const override { return std::uint64_t{4} << 20; }
    [[nodiscard]] std::uint64_t block_size() const override { return 65536; }
    Result<void> do_read(GuestOffset at, Buffers) override {
        on_read_(std::this_thread::get_id() != reader_, at);
        return {};
    }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        return Extent{.start = at, .length = limit, .kind = Extent::Kind::data};
    }

private:
    std::function<void(bool, GuestOffset)> on_read_;
    std::thread::id reader_ = std::this_thread::get_id();
};

constexpr std::uint32_t chunk = 256 << 10;
constexpr std::size_t simple_header = 16;

TEST(ServerMemory, AThreadOfTheCrewMayHaveNone) {
    Wire says;
    says << handshake();
    for (int i = 0; i < 4; ++i) says << request(Command::read, 0, chunk).bytes;
    std::atomic<bool> failed = false;
    const auto disk = std::make_shared<EventfulDisk>([&](bool by_crew, GuestOffset) {
        if (!by_crew) return;
        failed = true;
        throw std::bad_alloc();
    });
    EagerClient client(says.bytes);
    nbd::serve_client(client, with_contexts(exports_of(disk)), {.workers = 2});
    EXPECT_TRUE(failed);
    EXPECT_TRUE(client.ended());
}

/// What a client hears in that handshake.
std::size_t heard_in(const Bytes& handshake) {
    EagerClient client(handshake);
    const auto disk = std::make_shared<EventfulDisk>([](bool, GuestOffset) {});
    nbd::serve_client(client, with_contexts(exports_of(disk)), {.workers = 0});
    return client.heard();
}

TEST(ServerMemory, NothingFollowsHalfAReply) {
    // The crew has sent the first half of a reply, and another one waits to go out behind the second half.
    const auto hello = handshake(nbd::Style::simple);
    Wire says;
    says << hello << request(Command::read, 0, 2 * chunk).bytes << request(Command::read, 3 * chunk, 512).bytes;
    EagerClient client(says.bytes);
    std::latch half_is_out(1);
    const auto disk = std::make_shared<EventfulDisk>([&](bool by_crew, GuestOffset at) {
        if (!by_crew) return half_is_out.wait();
        if (at.value == 0) return;
        half_is_out.count_down();
        client.wait_until_it_listens();
        throw std::bad_alloc();
    });
    nbd::serve_client(client, with_contexts(exports_of(disk)), {.workers = 1});
    EXPECT_EQ(client.heard(), heard_in(hello) + simple_header + chunk);
}

TEST(ServerMemory, HalfAReplyDoesNotHoldUpTheCrew) {
    // The reader has sent the first half of a reply, and the crew waits to send another one.
    const auto hello = handshake(nbd::Style::simple);
    Wire says;
    says << hello << request(Command::read, 3 * chunk, chunk).bytes << request(Command::read, 0, 2 * chunk).bytes;
    EagerClient client(says.bytes);
    std::latch half_is_out(1);
    const auto disk = std::make_shared<EventfulDisk>([&](bool by_crew, GuestOffset at) {
        if (by_crew) return half_is_out.wait();
        if (at.value == 0) return;
        half_is_out.count_down();
        throw std::bad_alloc();
    });
    nbd::serve_client(client, with_contexts(exports_of(disk)), {.workers = 1});
    EXPECT_EQ(client.heard(), heard_in(hello) + simple_header + chunk);
}

TEST(ServerMemory, TheNextClientIsLetIn) {
    const TemporaryDirectory directory;
    std::uint64_t failed = 0;
    for (std::uint64_t n = 0;; ++n, ++failed) {
        const auto socket = directory / std::to_string(n);
        const auto server = must(NbdServer::make(exports_of(std::make_shared<TestDisk>(4096)), {.persistent = true}));
        must(server->listen_unix(socket));
        std::uint64_t hits = 0;
        std::jthread runs([&] {
            shortage = {.after = n};
            const Works works(true);
            const auto ran = server->run();
            hits = shortage.hits;
            EXPECT_TRUE(ran || ran.error().code == Errc::no_memory) << ran.error().message();
        });
        unsigned refused = 0;
        for (int i = 0; i < 3; ++i) {
            try {
                NbdClient(socket).go(nbd::Style::structured);
            } catch (const std::exception&) {
                ++refused;
            }
        }
        server->stop();
        runs.join();
        if (hits == 0) break;
        // Without the very first allocation the server does not begin.
        EXPECT_EQ(refused, n == 0 ? 3U : 1U) << "allocation " << n;
    }
    EXPECT_GT(failed, 3U);
}

}  // namespace
}  // namespace qcow::test
