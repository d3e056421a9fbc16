#include "server/vhost_user/split_ring.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "server/vhost_user/inflight.h"
#include "storage/file.h"
#include "support/result.h"

namespace qcow::vhost_user {
namespace {

using test::fails;
using test::must;
using testing::ElementsAre;
using testing::IsEmpty;

constexpr std::uint64_t memory_bytes = 8192;
constexpr std::uint16_t ring_size = 4;

// Where the parts of the ring lie.
constexpr std::uint64_t descriptors_at = 0;
constexpr std::uint64_t available_at = 0x100;
constexpr std::uint64_t used_at = 0x200;

/// A ring of four descriptors in 8 KiB of memory. The guest's addresses have a hole of 4 KiB behind the first 4 KiB.
class SplitRingTest : public testing::Test {
protected:
    SplitRingTest() : fd_(memfd_create("ring", MFD_CLOEXEC)) {
        EXPECT_EQ(ftruncate(fd_.get(), memory_bytes), 0);
        must(memory_.add({.guest_address = 0, .size = 4096, .user_address = 0}, fd_.get()));
        must(memory_.add({.guest_address = 8192, .size = 4096, .user_address = 4096, .file_offset = 4096}, fd_.get()));
    }

    [[nodiscard]] SplitRing ring(bool event_index = false, bool indirect = true) const {
        return must(SplitRing::find(memory_, {.size = ring_size,
                                              .addresses = {descriptors_at, used_at, available_at},
                                              .event_index = event_index,
                                              .indirect = indirect}));
    }

    template <class T>
    void put(std::uint64_t at, T value) const {
        std::memcpy(memory_.at_user(at, sizeof value, 1).data(), &value, sizeof value);
    }
    template <class T>
    [[nodiscard]] T get(std::uint64_t at) const {
        T value = {};
        std::memcpy(&value, memory_.at_user(at, sizeof value, 1).data(), sizeof value);
        return value;
    }

    void describe(std::uint64_t table, std::size_t index, std::uint64_t address, std::uint32_t length,
                  std::uint16_t flags, std::uint16_t next = 0) const {
        const auto at = table + index * 16;
        put(at, address);
        put(at + 8, length);
        put(at + 12, flags);
        put(at + 14, next);
    }

    /// Makes the request that begins at descriptor `head` available.
    void add(std::uint16_t head) const {
        const auto index = get<std::uint16_t>(available_at + 2);
        put(available_at + 4 + index % ring_size * 2, head);
        put(available_at + 2, static_cast<std::uint16_t>(index + 1));
    }

    FileDescriptor fd_;
    GuestMemory memory_;
    Chain chain_;
};

std::vector<std::size_t> sizes(const auto& pieces) {
    std::vector<std::size_t> result;
    for (const auto piece : pieces) result.push_back(piece.size());
    return result;
}

TEST_F(SplitRingTest, TakesAndCompletesRequests) {
    auto ring = this->ring();
    EXPECT_TRUE(ring.is_empty());
    EXPECT_EQ(must(ring.next()), std::nullopt);
    describe(descriptors_at, 2, 0x400, 16, VRING_DESC_F_NEXT, 0);
    describe(descriptors_at, 0, 0x500, 512, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 3);
    describe(descriptors_at, 3, 0x800, 1, VRING_DESC_F_WRITE);
    add(2);
    EXPECT_FALSE(ring.is_empty());
    ASSERT_EQ(must(ring.next()), 2);
    ASSERT_TRUE(ring.load(2, chain_));
    EXPECT_THAT(sizes(chain_.readable), ElementsAre(16));
    EXPECT_THAT(sizes(chain_.writable), ElementsAre(512, 1));
    EXPECT_EQ(chain_.bytes, 529U);
    EXPECT_EQ(chain_.writable[0].data(), memory_.at_user(0x500, 1, 1).data());
    ring.complete(2, 513);
    EXPECT_EQ(get<std::uint16_t>(used_at + 2), 1);
    EXPECT_EQ(get<std::uint32_t>(used_at + 4), 2U);
    EXPECT_EQ(get<std::uint32_t>(used_at + 8), 513U);
}

TEST_F(SplitRingTest, BuffersMayCrossRegionsButNotHoles) {
    const auto ring = this->ring();
    describe(descriptors_at, 0, 4000, 200, 0);
    EXPECT_FALSE(ring.load(0, chain_));  // 4096 to 8192 is nobody's
    GuestMemory adjacent;
    must(adjacent.add({.guest_address = 0, .size = 4096, .user_address = 0}, fd_.get()));
    must(adjacent.add({.guest_address = 4096, .size = 4096, .user_address = 4096, .file_offset = 4096}, fd_.get()));
    const auto whole = must(SplitRing::find(
        adjacent, {.size = ring_size, .addresses = {descriptors_at, used_at, available_at}, .indirect = true}));
    ASSERT_TRUE(whole.load(0, chain_));
    EXPECT_THAT(sizes(chain_.readable), ElementsAre(96, 104));
}

TEST_F(SplitRingTest, ChainsThatMakeNoSense) {
    const auto ring = this->ring();
    describe(descriptors_at, 0, 0x400, 16, VRING_DESC_F_NEXT, 1);
    describe(descriptors_at, 1, 0x400, 16, VRING_DESC_F_NEXT, 0);
    EXPECT_FALSE(ring.load(0, chain_)) << "a loop";
    describe(descriptors_at, 1, 0x400, 16, VRING_DESC_F_NEXT, ring_size);
    EXPECT_FALSE(ring.load(0, chain_)) << "a descriptor that does not exist";
    describe(descriptors_at, 0, 0x400, 16, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
    describe(descriptors_at, 1, 0x400, 16, 0);
    EXPECT_FALSE(ring.load(0, chain_)) << "a readable buffer behind a writable one";
    describe(descriptors_at, 0, ~std::uint64_t{0} - 3, 16, 0);
    EXPECT_FALSE(ring.load(0, chain_)) << "an address that wraps around";
}

TEST_F(SplitRingTest, IndirectTables) {
    constexpr std::uint64_t table = 0x600;
    describe(table, 0, 0x400, 16, VRING_DESC_F_NEXT, 1);
    describe(table, 1, 0x800, 1, VRING_DESC_F_WRITE);
    describe(descriptors_at, 0, table, 32, VRING_DESC_F_INDIRECT);
    const auto ring = this->ring();
    ASSERT_TRUE(ring.load(0, chain_));
    EXPECT_EQ(chain_.bytes, 17U);
    EXPECT_FALSE(this->ring(false, false).load(0, chain_)) << "nobody agreed on them";
    for (const std::uint32_t length : {0U, 31U, 1025U * 16}) {
        describe(descriptors_at, 0, table, length, VRING_DESC_F_INDIRECT);
        EXPECT_FALSE(ring.load(0, chain_)) << length;
    }
    describe(table, 1, table, 32, VRING_DESC_F_INDIRECT);
    describe(descriptors_at, 0, table, 32, VRING_DESC_F_INDIRECT);
    EXPECT_FALSE(ring.load(0, chain_)) << "a table in a table";
}

TEST_F(SplitRingTest, RingsThatMakeNoSense) {
    auto ring = this->ring();
    put(available_at + 2, static_cast<std::uint16_t>(ring_size + 1));
    EXPECT_TRUE(fails(ring.next(), Errc::corrupt));
    put(available_at + 2, std::uint16_t{0});
    add(ring_size);
    EXPECT_TRUE(fails(ring.next(), Errc::corrupt));
    for (const RingAddresses& addresses : {RingAddresses{8, used_at, available_at},
                                           {descriptors_at, used_at + 2, available_at},
                                           {descriptors_at, used_at, available_at + 1},
                                           {descriptors_at, memory_bytes - 8, available_at}}) {
        EXPECT_TRUE(
            fails(SplitRing::find(memory_, {.size = ring_size, .addresses = addresses}), Errc::invalid_argument));
    }
}

TEST_F(SplitRingTest, InterruptsOnlyThoseWhoWantIt) {
    auto ring = this->ring();
    ring.complete(0, 0);
    EXPECT_TRUE(ring.wants_interrupt());
    put(available_at, std::uint16_t{VRING_AVAIL_F_NO_INTERRUPT});
    ring.complete(0, 0);
    EXPECT_FALSE(ring.wants_interrupt());
    ring.ask_for_kicks(false);
    EXPECT_EQ(get<std::uint16_t>(used_at), VRING_USED_F_NO_NOTIFY);
    ring.ask_for_kicks(true);
    EXPECT_EQ(get<std::uint16_t>(used_at), 0);
}

TEST_F(SplitRingTest, EventIndexes) {
    constexpr auto used_event = available_at + 4 + 2 * ring_size;
    constexpr auto available_event = used_at + 4 + 8 * ring_size;
    auto ring = this->ring(true);
    ring.complete(0, 0);
    EXPECT_TRUE(ring.wants_interrupt()) << "the first time";
    put(used_event, std::uint16_t{3});
    ring.complete(0, 0);
    ring.complete(0, 0);
    EXPECT_FALSE(ring.wants_interrupt()) << "three of four";
    ring.complete(0, 0);
    EXPECT_TRUE(ring.wants_interrupt());
    ring.complete(0, 0);
    EXPECT_FALSE(ring.wants_interrupt());
    add(1);
    must(ring.next());
    ring.ask_for_kicks(true);
    EXPECT_EQ(get<std::uint16_t>(available_event), 1);
}

TEST_F(SplitRingTest, RecordOfRequestsInFlight) {
    const auto memory = memory_.at_user(0, InflightRecord::bytes_for(8), 8);
    {
        InflightRecord record(memory, 8);
        EXPECT_THAT(record.recover(10), IsEmpty());
        for (const int head : {5, 2, 7, 0}) record.begin(static_cast<std::uint16_t>(head));
        record.will_complete(2);
        record.has_completed(2, 11);
        EXPECT_THAT(InflightRecord(memory, 8).recover(11), ElementsAre(5, 7, 0));
        record.will_complete(7);
    }
    // The server ended before the driver saw request 7, or after it.
    const std::vector<std::byte> before(memory.begin(), memory.end());
    EXPECT_THAT(InflightRecord(memory, 8).recover(11), ElementsAre(5, 7, 0));
    std::ranges::copy(before, memory.begin());
    EXPECT_THAT(InflightRecord(memory, 8).recover(12), ElementsAre(5, 0));
    // Nothing in it is believed.
    std::ranges::fill(memory, std::byte{1});
    put(8, std::uint16_t{1});
    EXPECT_LE(InflightRecord(memory, 8).recover(99).size(), 8U);
}

TEST_F(SplitRingTest, RegionsThatCannotBe) {
    const auto refused = [&](const RegionDescription& region) {
        return fails(memory_.add(region, fd_.get()), Errc::invalid_argument);
    };
    EXPECT_TRUE(refused({.guest_address = 1 << 20, .size = 0, .user_address = 1 << 20}));
    EXPECT_TRUE(refused({.guest_address = ~std::uint64_t{0} - 10, .size = 4096, .user_address = 1 << 20}));
    EXPECT_TRUE(refused({.guest_address = 4095, .size = 4096, .user_address = 1 << 20}));
    EXPECT_TRUE(refused({.guest_address = 1 << 20, .size = 4096, .user_address = 4095}));
    EXPECT_TRUE(refused({.guest_address = 1 << 20, .size = 16384, .user_address = 1 << 20}));
    EXPECT_TRUE(refused(
        {.guest_address = 1 << 20, .size = 4096, .user_address = 1 << 20, .file_offset = ~std::uint64_t{0} - 100}));
    EXPECT_TRUE(fails(memory_.remove({.guest_address = 0, .size = 1, .user_address = 0}), Errc::not_found));
    must(memory_.remove({.guest_address = 0, .size = 4096, .user_address = 0}));
    EXPECT_TRUE(memory_.at_user(0, 1, 1).empty());
}

TEST_F(SplitRingTest, ChangedPagesAreRecorded) {
    const FileDescriptor log(memfd_create("log", MFD_CLOEXEC));
    ASSERT_EQ(ftruncate(log.get(), 4096), 0);
    memory_.set_log(must(SharedMemory::map(log.get(), 0, 1)));
    memory_.note_changed(0, 1);
    const auto shown = must(SharedMemory::map(log.get(), 0, 4096));
    EXPECT_EQ(shown.bytes()[0], std::byte{0}) << "nobody wants it yet";
    memory_.record_changes(true);
    memory_.note_changed(memory_.at_user(4096 + 100, 8, 1));
    EXPECT_EQ(shown.bytes()[0], std::byte{1 << 2});
    memory_.note_changed(4095, 2);
    EXPECT_EQ(shown.bytes()[0], std::byte{0b111});
    memory_.note_changed(std::uint64_t{100} << 20, 4096);
    EXPECT_EQ(shown.bytes()[1], std::byte{0}) << "behind the end of the log";
}

TEST_F(SplitRingTest, MemoryThatIsTakenAwayIsCounted) {
    const auto memory = memory_.at_user(4096, 4096, 1);
    memory[5] = std::byte{1};
    ASSERT_EQ(ftruncate(fd_.get(), 4096), 0);
    EXPECT_EQ(memory_.losses(), 0U);
    EXPECT_EQ(memory[5], std::byte{0});
    memory[6] = std::byte{2};
    EXPECT_EQ(memory[6], std::byte{2});
    EXPECT_EQ(memory_.losses(), 1U);
}

}  // namespace
}  // namespace qcow::vhost_user
