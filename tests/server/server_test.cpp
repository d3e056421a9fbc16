// The server and its clients: how many, how much, how long.

#include <gmock/gmock.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <filesystem>

#include "server/running_server.h"
#include "storage/file.h"

namespace qcow::test {
namespace {

using nbd::Command;
using nbd::Style;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

class Server : public testing::Test {
protected:
    static std::size_t entries_of(const char* directory) {
        return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(directory), {}));
    }

    /// Waits for something that happens on another thread.
    template <class F>
    static bool eventually(F&& condition) {
        for (int i = 0; i < 500; ++i) {
            if (condition()) return true;
            std::this_thread::sleep_for(milliseconds(10));
        }
        return false;
    }

    std::shared_ptr<TestDisk> disk_ = std::make_shared<TestDisk>(16 * MiB);
    std::vector<NbdExport> exports_ = {{"", "", disk_}};
};

TEST_F(Server, NothingIsLeftOfClientsThatHaveGone) {
    RunningServer server(exports_);
    const auto visit = [&] {
        for (int i = 0; i < 20; ++i) {
            NbdClient client(server.socket());
            client.go(Style::structured);
            for (int k = 0; k < 4; ++k) client.send(client.request(Command::read, 0, 8 * MiB));
            client.send(client.request(Command::write, 0, 8 * MiB) << std::string(100'000, 'x'));
        }
    };
    const auto files = entries_of("/proc/self/fd");
    const auto threads = entries_of("/proc/self/task");
    visit();
    EXPECT_TRUE(eventually([&] { return entries_of("/proc/self/fd") == files; }));
    EXPECT_TRUE(eventually([&] { return entries_of("/proc/self/task") == threads; }));
    EXPECT_TRUE(must_stop(server));
}

TEST_F(Server, WhatAClientCanHaveInFlightIsBounded) {
    NbdOptions options;
    options.limits.connection_bytes = MiB;
    RunningServer server(exports_, options);
    NbdClient client(server.socket());
    client.go(Style::structured);
    // Make the disk known as a slow one.
    disk_->delay_microseconds = 300;
    for (int i = 0; i < 20; ++i) ASSERT_EQ(client.write(0, Bytes(512)), 0U);
    disk_->delay_microseconds = 0;
    disk_->close();
    Wire flood;
    for (int i = 0; i < 64; ++i) flood << client.request(Command::write, 0, MiB).bytes << Bytes(MiB);
    const auto taken = client.send_until_stuck(flood.bytes);
    // What is in flight, a buffer of the server and those of the socket.
    EXPECT_LT(taken, 4 * MiB);
    EXPECT_GT(taken, MiB);
    disk_->open();
}

TEST_F(Server, AStuckClientDoesNotHoldUpOthers) {
    RunningServer server(exports_);
    NbdClient stuck(server.socket());
    stuck.go(Style::structured);
    // It asks for a lot and takes nothing.
    for (int i = 0; i < 200; ++i) stuck.send(stuck.request(Command::read, 0, 8 * MiB));
    NbdClient half(server.socket());
    half.go(Style::structured);
    half.send(half.request(Command::write, 0, MiB));
    NbdClient silent(server.socket());

    NbdClient other(server.socket());
    const auto begin = steady_clock::now();
    other.go(Style::structured);
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(other.read(0, 4096).error, 0U);
    EXPECT_LT(steady_clock::now() - begin, std::chrono::seconds(3));
    // Ending takes no longer than the grace that it is given.
    const auto end = steady_clock::now();
    must(server.stop());
    EXPECT_LT(steady_clock::now() - end, std::chrono::seconds(8));
}

TEST_F(Server, WhoDribblesIsDropped) {
    NbdOptions options;
    options.limits.handshake_seconds = 2;
    RunningServer server(exports_, options);
    NbdClient in_time(server.socket());
    in_time.go(Style::structured);
    NbdClient dribbling(server.socket());
    // A byte now and then is not silence, but does not get anywhere either.
    const auto hello =
        (Wire() << std::uint32_t{3} << nbd::option_magic << std::uint32_t{7} << std::uint32_t{4096}).bytes;
    EXPECT_THROW(
        for (std::size_t i = 0; i < 100; ++i) {
            dribbling.send(std::span(hello).subspan(std::min(i, hello.size() - 1), 1));
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        },
        Closed);
    EXPECT_EQ(in_time.read(0, 4096).error, 0U);  // and may be as slow as it likes
    must(server.stop());
}

TEST_F(Server, MoreClientsThanAreWelcomeWait) {
    NbdOptions options;
    options.limits.connections = 2;
    RunningServer server(exports_, options);
    auto first = std::make_unique<NbdClient>(server.socket());
    NbdClient second(server.socket());
    first->go(Style::simple);
    second.go(Style::simple);
    // Who gets an answer has its place.
    for (auto* client : {first.get(), &second}) EXPECT_EQ(client->command(Command::flush, 0, 0), 0U);
    NbdClient third(server.socket());
    std::atomic<bool> served = false;
    std::thread waiting([&] {
        third.go(Style::simple);
        served = true;
    });
    std::this_thread::sleep_for(milliseconds(200));
    EXPECT_FALSE(served);
    first.reset();
    waiting.join();
    EXPECT_TRUE(served);
    EXPECT_EQ(second.command(Command::flush, 0, 0), 0U);
}

/// Who has only connected takes nobody's place, however often and for how long.
TEST_F(Server, TheSilentKeepNobodyOut) {
    const auto threads = entries_of("/proc/self/task");
    NbdOptions options;
    options.limits.connections = 2;
    RunningServer server(exports_, options);
    NbdClient early(server.socket());
    early.go(Style::simple);
    std::vector<std::unique_ptr<NbdClient>> silent;
    for (const std::size_t count : {2U, 66U, 200U}) {
        SCOPED_TRACE(count);
        while (silent.size() < count) silent.push_back(std::make_unique<NbdClient>(server.socket()));
        const auto begin = steady_clock::now();
        NbdClient proper(server.socket());
        proper.go(Style::simple);
        EXPECT_EQ(proper.read(0, 4096).error, 0U);
        EXPECT_LT(steady_clock::now() - begin, std::chrono::seconds(15));  // half of what the silent may take
    }
    // The server's own, and one for each socket.
    EXPECT_LE(entries_of("/proc/self/task"), threads + 1 + 2 + 64);
    // Who came first has made way, who came last is welcome still.
    EXPECT_TRUE(silent.front()->is_closed());
    silent.back()->go(Style::simple);
    EXPECT_EQ(early.command(Command::flush, 0, 0), 0U);
    EXPECT_TRUE(must_stop(server));
}

/// Several choose an export while there is one place: the others are served when it is free again, or see the end.
TEST_F(Server, WhoHasNoPlaceYetWaits) {
    NbdOptions options;
    options.limits.connections = 1;
    RunningServer server(exports_, options);
    NbdClient second(server.socket());
    NbdClient third(server.socket());
    auto first = std::make_unique<NbdClient>(server.socket());
    second.greet();
    third.greet();
    first->go(Style::simple);
    EXPECT_EQ(first->command(Command::flush, 0, 0), 0U);  // so it has the place
    second.negotiate(Style::simple);
    std::atomic<bool> served = false;
    std::thread waiting([&] {
        EXPECT_EQ(second.command(Command::flush, 0, 0), 0U);
        served = true;
    });
    std::this_thread::sleep_for(milliseconds(200));
    EXPECT_FALSE(served);
    first.reset();
    waiting.join();
    third.negotiate(Style::simple);
    EXPECT_TRUE(must_stop(server));
    EXPECT_TRUE(third.is_closed());
}

TEST_F(Server, EndsWithItsLastClient) {
    RunningServer server(exports_, {.limits = {}, .persistent = false});
    auto first = std::make_unique<NbdClient>(server.socket());
    first->go(Style::simple);
    auto second = std::make_unique<NbdClient>(server.socket());
    second->go(Style::simple);
    first.reset();
    EXPECT_EQ(second->command(Command::flush, 0, 0), 0U);
    second.reset();
    must(server.wait());
    EXPECT_FALSE(std::filesystem::exists(server.socket()));
}

TEST_F(Server, WhatWasReceivedIsDoneBeforeTheEnd) {
    RunningServer server(exports_);
    NbdClient client(server.socket());
    client.go(Style::structured);
    disk_->delay_microseconds = 300;
    for (int i = 0; i < 20; ++i) ASSERT_EQ(client.write(0, Bytes(512)), 0U);
    disk_->close();
    for (std::uint64_t i = 0; i < 8; ++i)
        client.send(client.request(Command::write, i * MiB, 100, 0, i) << std::string(100, 'w'));
    ASSERT_TRUE(eventually([&] { return disk_->inside == 8; }));
    std::thread opener([&] {
        std::this_thread::sleep_for(milliseconds(200));
        disk_->open();
    });
    EXPECT_TRUE(must_stop(server));
    opener.join();
    for (int i = 0; i < 8; ++i) EXPECT_EQ(client.chunk().error, 0U);
    EXPECT_TRUE(client.is_closed());
    for (std::uint64_t i = 0; i < 8; ++i) EXPECT_EQ(disk_->bytes()[i * MiB + 99], std::byte{'w'});
    EXPECT_EQ(disk_->flushes, 1U);
}

TEST_F(Server, StopsBeforeItHasBegun) {
    const auto server = must(NbdServer::make(exports_));
    server->stop();
    must(server->run());
}

TEST_F(Server, WithoutThreadsForAConnectionItServesAllTheSame) {
    NbdOptions options;
    options.limits.workers = 0;
    RunningServer server(exports_, options);
    disk_->delay_microseconds = 300;
    NbdClient client(server.socket());
    client.go(Style::extended);
    for (int i = 0; i < 50; ++i) ASSERT_EQ(client.write(0, Bytes(512)), 0U);
    ASSERT_EQ(client.read(0, 3 * MiB).error, 0U);
    EXPECT_EQ(disk_->most_inside, 1U);
}

/// The sockets of this process that are connected by TCP from `port`.
std::vector<int> accepted_from(std::uint16_t port) {
    std::vector<int> found;
    for (int fd = 0; fd < 1024; ++fd) {
        sockaddr_in own = {};
        sockaddr_in peer = {};
        socklen_t own_length = sizeof own;
        socklen_t peer_length = sizeof peer;
        if (getsockname(fd, reinterpret_cast<sockaddr*>(&own), &own_length) == 0 && own.sin_family == AF_INET &&
            ntohs(own.sin_port) == port && getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &peer_length) == 0)
            found.push_back(fd);
    }
    return found;
}

TEST_F(Server, NoticesMachinesThatVanish) {
    const auto server = must(NbdServer::make(exports_));
    const auto port = must(server->listen_tcp("127.0.0.1", 0));
    std::thread running([&] { must(server->run()); });
    const FileDescriptor client(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    char hello = 0;
    EXPECT_EQ(recv(client.get(), &hello, 1, 0), 1);
    const auto accepted = accepted_from(port);
    EXPECT_EQ(accepted.size(), 1U);
    const auto option = [&](int level, int name) {
        int value = -1;
        socklen_t length = sizeof value;
        return accepted.empty() || getsockopt(accepted[0], level, name, &value, &length) != 0 ? -1 : value;
    };
    EXPECT_EQ(option(SOL_SOCKET, SO_KEEPALIVE), 1);
    EXPECT_EQ(option(IPPROTO_TCP, TCP_KEEPIDLE), 60);
    EXPECT_EQ(option(IPPROTO_TCP, TCP_KEEPINTVL), 10);
    EXPECT_EQ(option(IPPROTO_TCP, TCP_KEEPCNT), 6);
    server->stop();
    running.join();
}

TEST_F(Server, Tcp) {
    const auto server = must(NbdServer::make(exports_));
    const auto port = must(server->listen_tcp("localhost", 0));
    EXPECT_GT(port, 0);
    const auto other = must(NbdServer::make(exports_));
    EXPECT_TRUE(fails(other->listen_tcp("localhost", port), Errc::io, {"localhost", std::to_string(port)}));
}

}  // namespace
}  // namespace qcow::test
