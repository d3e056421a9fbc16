// Memory runs out in the server: it may let go of that client, and everybody else is served.

#include <gtest/gtest.h>

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
class EagerClient final : public nbd::Stream {
public:
    explicit EagerClient(Bytes says) : says_(std::move(says)) {}

    std::size_t receive(std::span<std::byte> to) override {
        const auto count = ended_ ? 0 : std::min(to.size(), says_.size() - taken_);
        std::copy_n(says_.begin() + static_cast<std::ptrdiff_t>(taken_), count, to.begin());
        taken_ += count;
        return count;
    }
    bool send(std::span<const std::byte> bytes) override {
        heard_ += bytes.size();
        return !ended_;
    }
    void wait_forever() override {}
    void shutdown() override { ended_ = true; }

    [[nodiscard]] bool ended() const { return ended_; }
    [[nodiscard]] std::size_t heard() const { return heard_; }

private:
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

Bytes handshake() {
    Wire says;
    says << std::uint32_t{3} << option(Option::structured_reply, {}).bytes;
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

/// Has memory on the thread that made it only.
class HungryDisk final : public Disk {
public:
    [[nodiscard]] std::uint64_t size() const override { return std::uint64_t{4} << 20; }
    [[nodiscard]] std::uint64_t block_size() const override { return 65536; }
    Result<void> read(GuestOffset, std::span<std::byte>) override {
        if (std::this_thread::get_id() == fed_) return {};
        failed = true;
        throw std::bad_alloc();
    }
    Result<Extent> extent(GuestOffset at, std::uint64_t limit) override {
        return Extent{.start = at, .length = limit, .kind = Extent::Kind::data};
    }
    std::atomic<bool> failed = false;

private:
    std::thread::id fed_ = std::this_thread::get_id();
};

TEST(ServerMemory, AThreadOfTheCrewMayHaveNone) {
    Wire says;
    says << handshake();
    for (int i = 0; i < 4; ++i) says << request(Command::read, 0, 256 << 10).bytes;
    const auto disk = std::make_shared<HungryDisk>();
    EagerClient client(says.bytes);
    nbd::serve_client(client, with_contexts(exports_of(disk)), {.workers = 2});
    EXPECT_TRUE(disk->failed);
    EXPECT_TRUE(client.ended());
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
