// Requests and replies, right and wrong ones.

#include <gmock/gmock.h>

#include <filesystem>
#include <map>

#include "server/running_server.h"

namespace qcow::test {
namespace {

using nbd::Command;
using nbd::Style;
using std::chrono::steady_clock;
namespace flag = nbd::command_flag;

constexpr std::uint32_t not_permitted = 1, io = 5, invalid = 22, no_space = 28, overflow = 75;
constexpr std::uint64_t disk_bytes = 6 * MiB + 123;

class Transmission : public testing::TestWithParam<Style> {
protected:
    Transmission() { disk_->fill(random_); }

    Bytes expected(std::uint64_t at, std::uint64_t length) {
        const auto part = disk_->bytes().subspan(at, length);
        return {part.begin(), part.end()};
    }

    Bytes random_bytes(std::size_t count) {
        const auto text = random_.bytes(count);
        const auto bytes = as_bytes(text);
        return {bytes.begin(), bytes.end()};
    }

    Random random_ = Random::named("transmission");
    std::shared_ptr<TestDisk> disk_ = std::make_shared<TestDisk>(disk_bytes);
};

std::string style_name(const testing::TestParamInfo<Style>& info) {
    return info.param == Style::simple ? "Simple" : info.param == Style::structured ? "Structured" : "Extended";
}
INSTANTIATE_TEST_SUITE_P(Styles, Transmission, testing::Values(Style::simple, Style::structured, Style::extended),
                         style_name);

TEST_P(Transmission, ReadsAndWritesOfAnySizeAnywhere) {
    SCOPED_TRACE(replay_hint());
    // Quick enough to be done on the spot at first, then so slow that the crew does it.
    for (const unsigned delay : {0U, 200U}) {
        RunningServer server({{"", "", disk_}});
        NbdClient client(server.socket());
        client.go(GetParam());
        disk_->delay_microseconds = delay;
        for (int i = 0; i < 60; ++i) {
            const auto at = random_.below(disk_bytes);
            const auto most =
                std::min<std::uint64_t>(disk_bytes - at, random_.pick<std::uint64_t>({1, 5000, 70'000, 3 * MiB}));
            const auto length = random_.between(1, most);
            if (random_.chance(50)) {
                const auto bytes = random_bytes(length);
                ASSERT_EQ(client.write(at, bytes), 0U);
                ASSERT_TRUE(expected(at, length) == bytes) << at << " " << length;
            } else {
                const auto read = client.read(at, length);
                ASSERT_EQ(read.error, 0U);
                ASSERT_TRUE(expected(at, length) == read.bytes) << at << " " << length;
            }
        }
        disk_->delay_microseconds = 0;
    }
}

TEST_P(Transmission, NothingIsReadAndWritten) {
    RunningServer server({{"", "", disk_}});
    NbdClient client(server.socket());
    client.go(GetParam());
    EXPECT_EQ(client.write(5, {}), 0U);
    EXPECT_EQ(client.read(disk_bytes, 0).error, 0U);
    EXPECT_EQ(client.command(Command::trim, 7, 0), 0U);
}

TEST_P(Transmission, MistakesAreAnsweredAndTheNextRequestIsServed) {
    RunningServer server({{"", "", disk_}});
    NbdClient client(server.socket());
    client.go(GetParam());
    const auto before = expected(0, disk_bytes);
    const auto bytes = random_bytes(5000);
    EXPECT_EQ(client.write(disk_bytes - 4999, bytes), no_space);
    EXPECT_EQ(client.write(~0ULL - 100, bytes), no_space);
    EXPECT_EQ(client.write(0, bytes, flag::req_one), invalid);
    EXPECT_EQ(client.read(disk_bytes, 1).error, invalid);
    EXPECT_EQ(client.read(~0ULL, 2).error, invalid);
    EXPECT_EQ(client.read(0, 33 * MiB).error, invalid);
    EXPECT_EQ(client.command(Command::trim, 0, disk_bytes + 1), no_space);
    EXPECT_EQ(client.command(Command::write_zeroes, disk_bytes, 1), no_space);
    EXPECT_EQ(client.command(Command::write_zeroes, 0, 1, flag::df), invalid);
    EXPECT_EQ(client.command(Command::cache, disk_bytes, 1), invalid);
    EXPECT_EQ(client.command(static_cast<Command>(9), 0, 0), invalid);
    EXPECT_EQ(client.command(static_cast<Command>(0xffff), 0, 4096), invalid);
    EXPECT_EQ(client.command(Command::flush, 0, 0, 0x8000), invalid);
    EXPECT_EQ(client.command(Command::block_status, 0, 4096), invalid);  // no context was agreed on
    EXPECT_TRUE(before == expected(0, disk_bytes));
    EXPECT_EQ(disk_->writes + disk_->discards + disk_->kept + disk_->released, 0U);
    EXPECT_TRUE(client.read(0, 4096).bytes == expected(0, 4096));
}

TEST_P(Transmission, ReadOnlyExports) {
    RunningServer server({{"", "", disk_, true}});
    NbdClient client(server.socket());
    client.go(GetParam());
    EXPECT_EQ(client.write(0, random_bytes(600'000)), not_permitted);
    EXPECT_EQ(client.command(Command::trim, 0, 4096), not_permitted);
    EXPECT_EQ(client.command(Command::write_zeroes, 0, 4096), not_permitted);
    EXPECT_EQ(client.command(Command::flush, 0, 0), 0U);
    EXPECT_EQ(client.command(Command::cache, 0, disk_bytes), 0U);
    EXPECT_EQ(client.read(0, 10).error, 0U);
    EXPECT_EQ(disk_->writes + disk_->discards + disk_->released, 0U);
}

TEST_P(Transmission, WhatBreaksTheProtocolEndsTheConnection) {
    RunningServer server({{"", "", disk_}});
    NbdClient bystander(server.socket());
    bystander.go(GetParam());
    const auto garbage = random_bytes(100);
    for (int i = 0; i < 3; ++i) {
        NbdClient client(server.socket());
        client.go(GetParam());
        if (i == 0) client.send(garbage);
        if (i == 1) client.send(client.request(Command::write, 0, 33 * MiB));
        if (i == 2) client.send(client.request(Command::disconnect, 0, 0));
        EXPECT_TRUE(client.is_closed()) << i;
    }
    // Those that go away in the middle of something.
    for (int i = 0; i < 4; ++i) {
        NbdClient client(server.socket());
        if (i > 0) client.go(GetParam());
        if (i == 1) client.send(std::span(garbage).first(13));
        if (i == 2) client.send(client.request(Command::write, 0, 4 * MiB) << std::span(garbage).first(99));
        if (i == 3) {
            for (int k = 0; k < 50; ++k) client.send(client.request(Command::read, 0, 4 * MiB));
        }
    }
    EXPECT_TRUE(bystander.read(1000, 100'000).bytes == expected(1000, 100'000));
    EXPECT_TRUE(must_stop(server));
}

TEST_P(Transmission, ErrorsOfTheDisk) {
    RunningServer server({{"", "", disk_}});
    NbdClient client(server.socket());
    client.go(GetParam());
    disk_->bad_sector = 5 * MiB;
    EXPECT_EQ(client.read(5 * MiB - 1000, 2000).error, io);
    EXPECT_EQ(client.write(5 * MiB, random_bytes(1)), io);
    EXPECT_EQ(client.write(3 * MiB, random_bytes(3 * MiB)), io);
    disk_->flush_fails = true;
    EXPECT_EQ(client.command(Command::flush, 0, 0), no_space);
    EXPECT_EQ(client.write(0, random_bytes(1), flag::fua), no_space);
    EXPECT_EQ(client.read(0, 5 * MiB).error, 0U);
    if (GetParam() == Style::simple) {
        // Success has been announced by then: there is no other way to say that it was not one.
        EXPECT_THROW(client.read(0, disk_bytes), Closed);
    } else {
        const auto read = client.read(0, disk_bytes);
        EXPECT_EQ(read.error, io);
        EXPECT_GT(read.data_chunks, 2U);
        EXPECT_EQ(client.read(0, 100).error, 0U);
    }
    EXPECT_TRUE(fails(server.stop(), Errc::no_space, {"full"}));
}

TEST_P(Transmission, DurabilityWhereItIsAskedFor) {
    RunningServer server({{"", "", disk_}});
    NbdClient client(server.socket());
    client.go(GetParam());
    const auto flushes = [&] { return disk_->flushes.load(); };
    EXPECT_EQ(client.write(0, random_bytes(100)), 0U);
    EXPECT_EQ(client.command(Command::trim, 0, 65536), 0U);
    EXPECT_EQ(flushes(), 0U);
    EXPECT_EQ(client.write(0, random_bytes(100), flag::fua), 0U);
    EXPECT_EQ(flushes(), 1U);
    EXPECT_EQ(client.command(Command::write_zeroes, 0, 65536, flag::fua), 0U);
    EXPECT_EQ(flushes(), 2U);
    EXPECT_EQ(client.command(Command::trim, 0, 65536, flag::fua), 0U);
    EXPECT_EQ(flushes(), 3U);
    EXPECT_EQ(client.command(Command::flush, 0, 0), 0U);
    EXPECT_EQ(flushes(), 4U);
    client.hang_up();
    EXPECT_TRUE(must_stop(server));
    EXPECT_EQ(flushes(), 5U);
}

TEST_P(Transmission, ZeroingAndDiscarding) {
    RunningServer server({{"", "", disk_}});
    NbdClient client(server.socket());
    client.go(GetParam());
    EXPECT_EQ(client.command(Command::write_zeroes, 1000, 3 * MiB, flag::fast_zero), 0U);
    EXPECT_EQ(disk_->released, 1U);
    EXPECT_TRUE(client.read(1000, 3 * MiB).bytes == Bytes(3 * MiB));
    EXPECT_EQ(client.command(Command::write_zeroes, 0, 65536, flag::no_hole), 0U);
    EXPECT_EQ(disk_->kept, 1U);
    EXPECT_EQ(client.command(Command::trim, 0, disk_bytes), 0U);
    EXPECT_EQ(disk_->discards, 1U);
}

TEST_P(Transmission, RepliesComeAsTheyAreReady) {
    RunningServer server({{"", "", disk_}});
    NbdClient client(server.socket());
    client.go(GetParam());
    // The server learns that this disk takes its time.
    disk_->delay_microseconds = 300;
    for (int i = 0; i < 20; ++i) ASSERT_EQ(client.read(0, 512).error, 0U);
    disk_->most_inside = 0;
    disk_->slow_sector = 0;
    Wire wire;
    for (std::uint64_t i = 0; i < 40; ++i) wire << client.request(Command::read, i * 100'000, 100, 0, i).bytes;
    client.send(wire);
    std::vector<std::uint64_t> order;
    for (int i = 0; i < 40; ++i) {
        const auto chunk = client.chunk(100);
        order.push_back(chunk.cookie);
        const auto data = std::span(chunk.data).last(100);
        EXPECT_TRUE(std::ranges::equal(data, expected(chunk.cookie * 100'000, 100)));
    }
    EXPECT_EQ(order.back(), 0U) << "the slow one held the others up";
    EXPECT_GT(disk_->most_inside, 4U);
    EXPECT_LE(disk_->most_inside, NbdLimits().workers);
    std::ranges::sort(order);
    EXPECT_EQ(std::ranges::unique(order).begin(), order.end());
}

TEST_P(Transmission, ManyRequestsFromManyClients) {
    SCOPED_TRACE(replay_hint());
    RunningServer server({{"", "", disk_}});
    std::vector<std::thread> threads;
    std::atomic<unsigned> wrong = 0;
    // Each client has a part of the disk for itself.
    constexpr std::uint64_t part = MiB;
    for (std::uint64_t c = 0; c < 5; ++c) {
        threads.emplace_back([&, c, random = Random(random_.below(~0ULL))]() mutable {
            NbdClient client(server.socket());
            client.go(GetParam());
            Bytes model = expected(c * part, part);
            for (int round = 0; round < 15; ++round) {
                disk_->delay_microseconds = round % 3 == 0 ? 100 : 0;
                // Requests on ranges that do not overlap, all on their way at once.
                std::map<std::uint64_t, std::pair<std::uint64_t, std::uint64_t>> reads;
                std::size_t replies = 0;
                for (std::uint64_t i = 0; i < 16; ++i) {
                    const auto at = i * part / 16 + random.below(1000);
                    const auto length = random.between(1, 60'000);
                    if (random.chance(50)) {
                        const auto text = random.bytes(length);
                        client.send(client.request(Command::write, c * part + at, length, 0, i) << text);
                        std::ranges::copy(as_bytes(text), model.begin() + static_cast<std::ptrdiff_t>(at));
                        ++replies;
                    } else {
                        client.send(client.request(Command::read, c * part + at, length,
                                                   flag::df * (GetParam() != Style::simple), i));
                        reads[i] = {at, length};
                        ++replies;
                    }
                    // A simple reply's length is known by its request only.
                    if (GetParam() != Style::simple && i < 15) continue;
                    for (; replies > 0; --replies) {
                        const auto chunk = client.chunk(GetParam() == Style::simple && reads.contains(i) ? length : 0);
                        wrong += chunk.error != 0 || !chunk.done;
                        const auto found = reads.find(chunk.cookie);
                        if (found == reads.end()) continue;
                        const auto [from, count] = found->second;
                        if (chunk.data.size() < count || !std::ranges::equal(std::span(chunk.data).last(count),
                                                                             std::span(model).subspan(from, count)))
                            ++wrong;
                    }
                }
            }
            wrong += expected(c * part, part) != model;
        });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0U);
    EXPECT_TRUE(must_stop(server));
}

}  // namespace
}  // namespace qcow::test
