// The server and its clients: how many, how much, how long.

#include <gmock/gmock.h>

#include <filesystem>

#include "server/running_server.h"

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
    options.limits.handshake_seconds = 1;
    RunningServer server(exports_, options);
    NbdClient in_time(server.socket());
    in_time.go(Style::structured);
    NbdClient dribbling(server.socket());
    // A byte now and then is not silence, but does not get anywhere either.
    const auto begin = steady_clock::now();
    const auto hello =
        (Wire() << std::uint32_t{3} << nbd::option_magic << std::uint32_t{7} << std::uint32_t{4096}).bytes;
    EXPECT_THROW(
        for (std::size_t i = 0; i < 100; ++i) {
            dribbling.send(std::span(hello).subspan(std::min(i, hello.size() - 1), 1));
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        },
        Closed);
    EXPECT_LT(steady_clock::now() - begin, std::chrono::seconds(8));
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

TEST_F(Server, Tcp) {
    const auto server = must(NbdServer::make(exports_));
    const auto port = must(server->listen_tcp("localhost", 0));
    EXPECT_GT(port, 0);
    const auto other = must(NbdServer::make(exports_));
    EXPECT_TRUE(fails(other->listen_tcp("localhost", port), Errc::io, {"localhost", std::to_string(port)}));
}

}  // namespace
}  // namespace qcow::test
