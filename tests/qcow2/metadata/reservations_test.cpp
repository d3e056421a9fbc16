#include "qcow2/metadata/reservations.h"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <set>

#include "support/random.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t disk = 1 << 20;

/// Hands out host clusters from a file that grows, as an allocator does.
class Placer {
public:
    explicit Placer(std::uint64_t most) : reservations(most) {}

    /// The host clusters of `count` guest clusters from `guest` on, in whatever pieces they come.
    void place(std::uint64_t guest, std::uint64_t count) {
        while (count > 0) {
            auto run = reservations.take_for(guest, count);
            if (!run) run = reserve(guest, count);
            for (std::uint64_t i = 0; i < run->count; ++i) {
                EXPECT_TRUE(used.insert(run->first + i).second) << "host cluster " << run->first + i << " twice";
                EXPECT_TRUE(places.emplace(guest + i, run->first + i).second);
            }
            guest += run->count;
            count -= run->count;
        }
    }

    [[nodiscard]] std::uint64_t extents() const {
        std::uint64_t result = 0;
        auto previous = places.end();
        for (auto at = places.begin(); at != places.end(); previous = at++) {
            if (previous == places.end() || previous->first + 1 != at->first || previous->second + 1 != at->second)
                ++result;
        }
        return result;
    }

    Reservations reservations;
    std::map<std::uint64_t, std::uint64_t> places;
    std::set<std::uint64_t> used;
    std::uint64_t file_end = 100;
    std::uint64_t reserved = 0;  // how often

private:
    std::optional<ClusterRun> reserve(std::uint64_t guest, std::uint64_t count) {
        auto window = reservations.next_window(guest, count, disk);
        if (window) {
            EXPECT_LE(window->first, guest);
            EXPECT_GT(window->end(), guest);
        } else {
            if (const auto spare = reservations.take_spare(guest, count)) return spare;
            window = {guest, count};
        }
        const ClusterRun run{file_end, window->count};
        file_end += window->count;
        ++reserved;
        reservations.add(*window, {&run, 1});
        if (const auto taken = reservations.take_for(guest, count)) return taken;
        return reservations.take_spare(guest, 1);
    }
};

TEST(ReservationsTest, OneWriteIsOneExtent) {
    Placer placer(1024);
    placer.place(7, 32);
    EXPECT_EQ(placer.extents(), 1U);
    EXPECT_EQ(placer.reserved, 1U);
    EXPECT_TRUE(placer.reservations.take_all().empty());
}

TEST(ReservationsTest, WhatIsWrittenFrontToBackLiesSo) {
    Placer placer(1024);
    for (std::uint64_t guest = 0; guest < 16384; guest += 4) placer.place(guest, 4);
    EXPECT_EQ(placer.extents(), 1U);
    EXPECT_LE(placer.reserved, 25U);
}

/// Requests that are in flight together arrive in any order.
TEST(ReservationsTest, TheOrderOfArrivalDoesNotMatter) {
    auto random = test::Random::named("arrival");
    for (int round = 0; round < 20; ++round) {
        Placer placer(1024);
        for (std::uint64_t begin = 0; begin < 16384; begin += 256) {
            std::vector<std::uint64_t> requests;
            for (std::uint64_t guest = begin; guest < begin + 256; guest += 4) requests.push_back(guest);
            while (!requests.empty()) {
                const auto next = requests.begin() + static_cast<std::ptrdiff_t>(random.below(requests.size()));
                placer.place(*next, 4);
                requests.erase(next);
            }
        }
        EXPECT_LE(placer.extents(), 24U);
        EXPECT_EQ(placer.used.size(), 16384U);
    }
}

TEST(ReservationsTest, SeveralStreamsKeepApart) {
    Placer placer(1024);
    for (std::uint64_t guest = 0; guest < 1024; guest += 4) {
        for (std::uint64_t stream = 0; stream < 4; ++stream) placer.place(stream * 100'000 + guest, 4);
    }
    EXPECT_LE(placer.extents(), 32U);
}

/// What a crash would leak.
TEST(ReservationsTest, LittleIsReservedForLittleUse) {
    Placer placer(1024);
    placer.place(5000, 1);
    EXPECT_TRUE(placer.reservations.take_all().empty());
    auto random = test::Random::named("little");
    for (std::uint64_t i = 0; i < 300; ++i) {
        const auto guest = random.below(disk);
        if (!placer.places.contains(guest)) placer.place(guest, 1);
    }
    std::uint64_t left = 0;
    for (const auto& run : placer.reservations.take_all()) left += run.count;
    EXPECT_LE(left, 4 * placer.used.size());
}

/// Whatever happens, each host cluster is handed out once, and what is left comes back.
TEST(ReservationsTest, NothingIsHandedOutTwiceOrLost) {
    auto random = test::Random::named("twice");
    for (int round = 0; round < 50; ++round) {
        Placer placer(random.between(1, 300));
        const auto span = random.between(10, 5000);
        for (int i = 0; i < 400; ++i) {
            const auto guest = random.below(span);
            std::uint64_t count = 0;
            while (count < 30 && !placer.places.contains(guest + count)) ++count;
            if (count != 0) placer.place(guest, random.between(1, count));
        }
        for (const auto& run : placer.reservations.take_all()) {
            for (auto cluster = run.first; cluster < run.end(); ++cluster)
                ASSERT_TRUE(placer.used.insert(cluster).second);
        }
        EXPECT_EQ(placer.used.size(), placer.file_end - 100);
    }
}

TEST(ReservationsTest, ScatteredClusters) {
    Reservations reservations(1024);
    const std::array<ClusterRun, 3> runs = {{{10, 2}, {20, 3}, {40, 5}}};
    reservations.add({100, 6}, runs);
    const auto expect = [](std::optional<ClusterRun> taken, std::uint64_t first, std::uint64_t count) {
        ASSERT_TRUE(taken);
        EXPECT_EQ(taken->first, first);
        EXPECT_EQ(taken->count, count);
    };
    expect(reservations.take_for(103, 9), 21, 2);
    expect(reservations.take_for(100, 9), 10, 2);
    expect(reservations.take_for(105, 9), 40, 1);
    EXPECT_FALSE(reservations.take_for(106, 1));
    EXPECT_FALSE(reservations.take_for(100, 1));
    EXPECT_FALSE(reservations.take_spare(500, 5));
    expect(reservations.take_spare(500, 4), 41, 4);
    EXPECT_FALSE(reservations.take_spare(600, 1));
    expect(reservations.take_any(), 20, 1);
    EXPECT_FALSE(reservations.take_for(102, 9));
    EXPECT_FALSE(reservations.take_any());
}

}  // namespace
}  // namespace qcow::qcow2
