// A virtual machine and its front end that are hostile. Whatever they do, the server stays, and serves the next one.

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <functional>
#include <thread>

#include "server/guest_disk.h"
#include "support/bytes.h"
#include "support/effort.h"
#include "support/random.h"

namespace qcow::test {
namespace {

using front::bytes_of;
using front::Connection;
using front::Fd;
using front::FrontEnd;
using front::Message;
using front::Options;
using front::payload;
using front::Segment;
using front::VringAddress;
using front::VringState;
using std::chrono::milliseconds;

constexpr std::uint64_t MB = std::uint64_t{1} << 20;
constexpr milliseconds soon{2000};

class HostileGuestTest : public testing::Test {
protected:
    HostileGuestTest() {
        FrontEnd front(disk_.socket());
        front.start();
        EXPECT_EQ(front.write(0, contents()), VIRTIO_BLK_S_OK);
    }
    ~HostileGuestTest() override { EXPECT_NO_THROW(disk_.stop()); }

    static Bytes contents() { return repeated(4096, 0x5a); }

    static void expect_reads(FrontEnd& front, unsigned queue) {
        Bytes found(4096);
        ASSERT_EQ(front.read(0, found, queue), VIRTIO_BLK_S_OK);
        ASSERT_EQ(found, contents());
    }

    void expect_serves_the_next() {
        FrontEnd front(disk_.socket());
        front.start();
        expect_reads(front, 0);
    }

    /// The server's open files.
    [[nodiscard]] std::ptrdiff_t descriptors() const {
        std::string pid;
        std::getline(std::ifstream(disk_.directory() / "pid"), pid);
        return std::distance(std::filesystem::directory_iterator("/proc/" + pid + "/fd"), {});
    }

    /// Expects that the server has no more descriptors than `before`. It hears a little later that a front end has
    /// left.
    void expect_nothing_left(std::ptrdiff_t before) const {
        for (int i = 0; i < 500 && descriptors() > before + 2; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        EXPECT_LE(descriptors(), before + 2);
    }

    GuestDisk disk_{Program::qcow, "64M", 2};
};

// ---- Rings ----

struct RingAttack {
    const char* name;
    std::function<void(FrontEnd&)> attack;
    bool survives = true;  ///< whether the request is completed: the queue goes on
    std::uint64_t features = ~std::uint64_t{0};
};

constexpr std::uint16_t next = VRING_DESC_F_NEXT;
constexpr std::uint16_t writes = VRING_DESC_F_WRITE;
constexpr std::uint16_t indirect = VRING_DESC_F_INDIRECT;

/// A place in the scratch memory.
std::uint64_t place(FrontEnd& front, std::uint64_t at) { return front.scratch() + at; }

/// Puts a header into descriptor 0, this data into 1, a status into 2, and makes the request available.
void push_request(FrontEnd& front, std::uint32_t type, vring_desc data) {
    const virtio_blk_outhdr header{type, 0, 0};
    std::memcpy(front.memory().at(place(front, 0)), &header, sizeof header);
    auto& queue = front.queue(0);
    queue.descriptor(0) = {place(front, 0), sizeof header, next, 1};
    queue.descriptor(1) = {data.addr, data.len, static_cast<std::uint16_t>(data.flags | next), 2};
    queue.descriptor(2) = {place(front, 64), 1, writes, 0};
    queue.push(0);
}

void push_chain(FrontEnd& front, std::initializer_list<vring_desc> chain) {
    std::uint16_t i = 0;
    for (const auto& descriptor : chain) front.queue(0).descriptor(i++) = descriptor;
    front.queue(0).push(0);
}

/// Makes an indirect table with these descriptors available, in a descriptor that says it has `length` bytes.
void push_table(FrontEnd& front, std::initializer_list<vring_desc> table, std::uint32_t length,
                std::uint16_t flags = indirect) {
    std::memcpy(front.memory().at(place(front, 4096)), table.begin(), table.size() * sizeof(vring_desc));
    push_chain(front, {{place(front, 4096), length, flags, 1}});
}

std::vector<RingAttack> ring_attacks() {
    const auto in = [](std::uint64_t address, std::uint32_t length) {
        return [=](FrontEnd& front) { push_request(front, VIRTIO_BLK_T_IN, {address, length, writes, 0}); };
    };
    const auto past_end = [](std::uint32_t type, std::uint16_t flags) {
        return [=](FrontEnd& front) { push_request(front, type, {front.memory().end() - 512, 4096, flags, 0}); };
    };
    const auto d = [](FrontEnd& front, std::uint32_t length, std::uint16_t flags, std::uint16_t index) {
        return vring_desc{place(front, 0), length, flags, index};
    };
    const auto no_indirect = ~front::feature::indirect;
    return {
        {"a loop of one", [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 0)}); }},
        {"a loop of two", [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 1), d(f, 16, next, 0)}); }},
        {"a loop of all",
         [=](FrontEnd& f) {
             for (unsigned i = 0; i < 128; ++i)
                 f.queue(0).descriptor(i) = d(f, 16, next, static_cast<std::uint16_t>((i + 1) % 128));
             f.queue(0).push(5);
         }},
        {"a link outside of the table", [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 128)}); }},
        {"a link far outside of the table", [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 65535)}); }},
        {"a read past the memory", past_end(VIRTIO_BLK_T_IN, writes)},
        {"a write past the memory", past_end(VIRTIO_BLK_T_OUT, 0)},
        {"data at 0", in(0, 512)},
        {"data at the end of all addresses", in(~std::uint64_t{0} - 100, 512)},
        {"data at the last address", in(~std::uint64_t{0}, 1)},
        {"all the data there can be", in(0, ~std::uint32_t{0})},
        {"the header outside of the memory",
         [=](FrontEnd& f) { push_chain(f, {{64, 16, next, 1}, d(f, 1, writes, 0)}); }},
        {"the status outside of the memory",
         [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 1), {64, 1, writes, 0}}); }},
        {"no header", [=](FrontEnd& f) { push_chain(f, {d(f, 1, writes, 0)}); }},
        {"no status", [=](FrontEnd& f) { push_chain(f, {d(f, 16, 0, 0)}); }},
        {"an empty status", [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 1), d(f, 0, writes, 0)}); }},
        {"an empty header", [=](FrontEnd& f) { push_chain(f, {d(f, 0, next, 1), d(f, 1, writes, 0)}); }},
        {"a short header", [=](FrontEnd& f) { push_chain(f, {d(f, 15, next, 1), d(f, 1, writes, 0)}); }},
        {"nothing at all", [=](FrontEnd& f) { push_chain(f, {d(f, 0, 0, 0)}); }},
        {"the status before the header",
         [=](FrontEnd& f) { push_chain(f, {d(f, 1, writes | next, 1), d(f, 16, 0, 0)}); }},
        {"unknown flags", [=](FrontEnd& f) { push_chain(f, {d(f, 16, 0xfff9, 1), d(f, 1, 0xfffa, 0)}); }},
        {"4 GiB of the same memory",
         [=](FrontEnd& f) {
             auto& queue = f.queue(0);
             queue.descriptor(0) = d(f, 16, next, 1);
             for (std::uint16_t i = 1; i < 127; ++i)
                 queue.descriptor(i) = {f.memory().regions()[0].guest, 32 * MB, next | writes,
                                        static_cast<std::uint16_t>(i + 1)};
             queue.descriptor(127) = d(f, 1, writes, 0);
             queue.push(0);
         }},
        {"a table of nothing", [=](FrontEnd& f) { push_table(f, {}, 0); }},
        {"a table of half a descriptor", [=](FrontEnd& f) { push_table(f, {d(f, 1, writes, 0)}, 8); }},
        {"a table of one and a half", [=](FrontEnd& f) { push_table(f, {d(f, 16, next, 1), d(f, 1, writes, 0)}, 24); }},
        {"a table of 4 GiB", [=](FrontEnd& f) { push_table(f, {d(f, 16, 0, 0)}, 0xfffffff0); }},
        {"a table in a table",
         [=](FrontEnd& f) { push_table(f, {{place(f, 4096), 32, indirect, 0}, d(f, 1, writes, 0)}, 32); }},
        {"a table with a link", [=](FrontEnd& f) { push_table(f, {d(f, 1, writes, 0)}, 16, indirect | next); }},
        {"a table that is written", [=](FrontEnd& f) { push_table(f, {d(f, 16, 0, 0)}, 16, indirect | writes); }},
        {"a loop in a table", [=](FrontEnd& f) { push_table(f, {d(f, 16, next, 1), d(f, 1, next, 0)}, 32); }},
        {"a link out of a table", [=](FrontEnd& f) { push_table(f, {d(f, 16, next, 2)}, 32); }},
        {"a table outside of the memory", [=](FrontEnd& f) { push_chain(f, {{64, 32, indirect, 0}}); }},
        {"a table past the memory", [=](FrontEnd& f) { push_chain(f, {{f.memory().end() - 16, 32, indirect, 0}}); }},
        {"a table behind a header",
         [=](FrontEnd& f) { push_chain(f, {d(f, 16, next, 1), {place(f, 4096), 16, indirect, 0}}); }},
        {"a table that was not negotiated",
         [=](FrontEnd& f) { push_table(f, {d(f, 16, next, 1), d(f, 1, writes, 0)}, 32); }, true, no_indirect},
        {"a request that does not exist", [](FrontEnd& f) { f.queue(0).push(128); }, false},
        {"a request that cannot exist", [](FrontEnd& f) { f.queue(0).push(65535); }, false},
        {"too many requests",
         [](FrontEnd& f) {
             f.queue(0).available().idx = 129;
             f.queue(0).kick();
         },
         false},
        {"requests that were not made yet",
         [](FrontEnd& f) {
             f.queue(0).available().idx = 65535;
             f.queue(0).kick();
         },
         false},
    };
}

TEST_F(HostileGuestTest, RingsThatAreWrong) {
    for (const auto& [name, attack, survives, features] : ring_attacks()) {
        SCOPED_TRACE(name);
        {
            FrontEnd front(disk_.socket(), {.features = features, .queues = 2});
            front.start();
            attack(front);
            EXPECT_EQ(front.queue(0).pop(survives ? soon : milliseconds(10)).has_value(), survives);
            EXPECT_EQ(front.queue(0).wait_for_error(survives ? milliseconds(0) : soon), !survives);
            expect_reads(front, 1);
        }
        expect_serves_the_next();
        if (HasFatalFailure()) return;
    }
}

TEST_F(HostileGuestTest, DataInTheRings) {
    for (const bool used : {false, true}) {
        FrontEnd front(disk_.socket(), {.queues = 2});
        front.start();
        auto& queue = front.queue(0);
        const auto at = used ? queue.used_address() : queue.descriptors_address();
        push_request(front, VIRTIO_BLK_T_IN, {at, 1024, writes, 0});
        static_cast<void>(queue.pop(milliseconds(50)));
        queue.kick();
        expect_reads(front, 1);
    }
    expect_serves_the_next();
}

TEST_F(HostileGuestTest, DescriptorsThatChangeWhileTheyAreRead) {
    auto random = Random::named("hostile descriptors");
    for (int round = 0; round < 4; ++round) {
        FrontEnd front(disk_.socket(), {.queues = 2});
        front.start();
        std::atomic<bool> stop = false;
        std::thread changer([&, seed = random.below(1000)] {
            Random chaos(seed);
            auto& queue = front.queue(0);
            while (!stop) {
                auto& descriptor = queue.descriptor(static_cast<unsigned>(chaos.below(4)));
                descriptor.flags = static_cast<std::uint16_t>(chaos.below(8));
                descriptor.len = chaos.pick({0U, 1U, 16U, 512U, 65536U, ~0U});
                descriptor.addr = chaos.pick({front.scratch(), front.scratch() + 16, front.memory().end() - 100,
                                              std::uint64_t{0}, queue.descriptors_address()});
                descriptor.next = static_cast<std::uint16_t>(chaos.pick({0U, 1U, 2U, 3U, 128U}));
            }
        });
        const auto end = std::chrono::steady_clock::now() + milliseconds(60) * effort();
        for (std::uint16_t i = 0; std::chrono::steady_clock::now() < end; ++i) {
            front.queue(0).push(i % 4);
            while (front.queue(0).pop(milliseconds(0))) {
            }
        }
        stop = true;
        changer.join();
        expect_reads(front, 1);
    }
    // What was in the sectors that it wrote is its own affair.
    FrontEnd front(disk_.socket());
    front.start();
    EXPECT_EQ(front.write(0, contents()), VIRTIO_BLK_S_OK);
}

TEST_F(HostileGuestTest, MemoryThatIsTruncated) {
    for (const bool all : {false, true}) {
        FrontEnd front(disk_.socket(), {.queues = 2, .regions = {16 * MB, 4 * MB}});
        front.start();
        const auto& [first, second] = std::tie(front.memory().regions()[0], front.memory().regions()[1]);
        ASSERT_EQ(ftruncate(second.file.get(), 0), 0);
        // The data is gone: the request fails, and the queue goes on.
        for (const std::uint32_t type : {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT}) {
            EXPECT_EQ(front.request(type, 64, std::array{Segment{second.guest + 100, 65536}}), VIRTIO_BLK_S_IOERR);
            EXPECT_EQ(front.request(type, 64, std::array{Segment{second.guest, 512}}), VIRTIO_BLK_S_IOERR);
        }
        EXPECT_EQ(front.request(VIRTIO_BLK_T_DISCARD, 0, std::array{Segment{second.guest, 16}}), VIRTIO_BLK_S_IOERR);
        expect_reads(front, 0);
        if (all) {
            // The rings are gone.
            ASSERT_TRUE(front.queue(0).submit(VIRTIO_BLK_T_FLUSH, 0, {}));
            ASSERT_EQ(ftruncate(first.file.get(), 0), 0);
            for (unsigned i = 0; i < 2; ++i) front.queue(i).kick();
            std::this_thread::sleep_for(milliseconds(20));
        }
    }
    expect_serves_the_next();
}

// ---- Events ----

TEST_F(HostileGuestTest, EventsThatAreNotEvents) {
    const Fd null(open("/dev/null", O_RDWR | O_CLOEXEC));
    const Fd file(open((disk_.directory() / "file").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    std::array<int, 2> ends;
    ASSERT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
    const Fd reader(ends[0]);
    const Fd writer(ends[1]);
    // One whose counter is full: whoever adds to it waits.
    const Fd full(eventfd(0, EFD_CLOEXEC));
    ASSERT_EQ(eventfd_write(full.get(), ~eventfd_t{0} - 1), 0);
    for (const auto message : {Message::set_vring_kick, Message::set_vring_call, Message::set_vring_err}) {
        for (const auto* fd : {&null, &file, &reader, &writer, &full}) {
            FrontEnd front(disk_.socket(), {.queues = 2});
            front.start();
            try {
                front.set(message, bytes_of(std::uint64_t{0}), std::array{fd->get()});
                ASSERT_TRUE(front.queue(0).submit(VIRTIO_BLK_T_FLUSH, 0, {}));
                front.queue(0).publish();
                static_cast<void>(front.queue(0).pop(milliseconds(5)));
            } catch (const front::Refused&) {
            }
            expect_reads(front, 1);
        }
    }
    expect_serves_the_next();
}

TEST_F(HostileGuestTest, KicksForNothing) {
    FrontEnd front(disk_.socket(), {.queues = 2});
    front.start();
    for (int i = 0; i < 20000; ++i) front.queue(0).kick();
    expect_reads(front, 0);
    expect_reads(front, 1);
}

// ---- Messages ----

TEST_F(HostileGuestTest, RingsInTheWrongPlace) {
    struct Wrong {
        std::uint64_t descriptors, used, available;
    };
    FrontEnd honest(disk_.socket());
    const auto user = honest.memory().user(honest.queue(0).descriptors_address());
    const auto end = honest.memory().user(honest.memory().end());
    const auto used = honest.memory().user(honest.queue(0).used_address());
    const auto available = honest.memory().user(honest.queue(0).available_address());
    for (const auto& wrong :
         {Wrong{0, used, available}, Wrong{user, 0, available}, Wrong{user, used, 0}, Wrong{user + 1, used, available},
          Wrong{user + 8, used, available}, Wrong{user, used + 2, available}, Wrong{user, used, available + 1},
          Wrong{end - 16, used, available}, Wrong{user, end - 16, available}, Wrong{user, used, end - 16},
          Wrong{~std::uint64_t{15}, used, available}, Wrong{user, ~std::uint64_t{3}, available}}) {
        try {
            honest.start();
            honest.set(Message::set_vring_addr,
                       bytes_of(VringAddress{0, 0, wrong.descriptors, wrong.used, wrong.available, 0}));
            honest.queue(0).kick();
            ADD_FAILURE() << "rings at " << wrong.descriptors << ", " << wrong.used << ", " << wrong.available;
        } catch (const front::Refused&) {
        } catch (const front::Disconnected&) {
        }
        honest.queue(0).reset();
        honest.reconnect();
        expect_reads(honest, 0);
    }
}

TEST_F(HostileGuestTest, MemoryThatCannotBe) {
    struct Table {
        const char* name;
        std::vector<front::MemoryRegion> regions;
        std::size_t descriptors;
        std::uint64_t count;
    };
    const auto file = front::memory_file(MB);
    const std::uint64_t user = 0x7f0000000000;
    const front::MemoryRegion good{MB, MB, user, 0};
    const auto most = ~std::uint64_t{0};
    const std::vector<Table> tables = {
        {"no descriptor", {good}, 0, 1},
        {"too few descriptors", {good, {2 * MB, MB, user + MB, 0}}, 1, 2},
        {"too many descriptors", {good}, 2, 1},
        {"far too many descriptors", {good}, 30, 1},
        {"more regions than it says", {good, {2 * MB, MB, user + MB, 0}}, 2, 1},
        {"fewer regions than it says", {good}, 1, 2},
        {"nine regions", std::vector(9, good), 9, 9},
        {"4 billion regions", {good}, 1, 0xffffffff},
        {"the same region twice", {good, good}, 2, 2},
        {"overlap", {good, {MB + 4096, MB, user + MB, 0}}, 2, 2},
        {"overlap of user addresses", {good, {2 * MB, MB, user + 4096, 0}}, 2, 2},
        {"an empty region", {{MB, 0, user, 0}}, 1, 1},
        {"all addresses", {{0, most, 0, 0}}, 1, 1},
        {"more than all addresses", {{most - 4096, MB, user, 0}}, 1, 1},
        {"user addresses that wrap", {{MB, MB, most - 4096, 0}}, 1, 1},
        {"an offset that wraps", {{MB, MB, user, most - 4095}}, 1, 1},
        {"an offset that wraps with the size", {{MB, most - 8192, user, 16384}}, 1, 1},
        {"4 EiB", {{MB, std::uint64_t{1} << 62, user, 0}}, 1, 1},
    };
    for (const auto& [name, regions, descriptors, count] : tables) {
        SCOPED_TRACE(name);
        {
            FrontEnd front(disk_.socket(), {.queues = 2});
            front.start();
            auto message = payload(count);
            for (const auto& region : regions) {
                const auto more = payload(region);
                message.insert(message.end(), more.begin(), more.end());
            }
            try {
                front.set(Message::set_mem_table, message, std::vector<int>(descriptors, file.get()));
                ADD_FAILURE() << "accepted";
            } catch (const front::Refused&) {
            } catch (const front::Disconnected&) {
            }
        }
        expect_serves_the_next();
    }
    // Regions one by one, without an end, and those that are not there.
    FrontEnd front(disk_.socket());
    EXPECT_THROW(front.set(Message::rem_mem_reg, payload(std::uint64_t{0}, good)), front::Refused);
    std::uint64_t added = 0;
    try {
        for (; added < 10000; ++added) {
            const front::MemoryRegion region{(added + 1) << 40, MB, user + (added << 32), 0};
            front.set(Message::add_mem_reg, payload(std::uint64_t{0}, region), std::array{file.get()});
        }
        ADD_FAILURE() << "accepted";
    } catch (const front::Refused&) {
    }
    EXPECT_LT(added, front.connection().ask_number(Message::get_max_mem_slots));
}

TEST_F(HostileGuestTest, MemoryThatGoesAwayUnderRequests) {
    FrontEnd front(disk_.socket(), {.queues = 2, .regions = {16 * MB, 4 * MB}});
    front.start();
    const auto& region = front.memory().regions()[1];
    const auto message = payload(std::uint64_t{0}, static_cast<const front::MemoryRegion&>(region));
    const std::array segments = {Segment{region.guest, 65536}};
    for (int i = 0; i < 20; ++i) {
        for (int j = 0; j < 30; ++j) ASSERT_TRUE(front.queue(0).submit(VIRTIO_BLK_T_IN, 0, segments));
        front.queue(0).publish();
        front.set(Message::rem_mem_reg, message);
        for (int j = 0; j < 30; ++j) {
            const auto status = front.queue(0).wait().status;
            ASSERT_TRUE(status == VIRTIO_BLK_S_OK || status == VIRTIO_BLK_S_IOERR || status == 0xff);
        }
        expect_reads(front, 0);
        front.set(Message::add_mem_reg, message, std::array{region.file.get()});
        ASSERT_EQ(front.request(VIRTIO_BLK_T_IN, 0, segments), VIRTIO_BLK_S_OK);
    }
}

TEST_F(HostileGuestTest, MessagesOfWrongLengths) {
    const Fd null(open("/dev/null", O_RDWR | O_CLOEXEC));
    const auto before = descriptors();
    for (std::uint32_t message = 0; message < 48; ++message) {
        for (const std::size_t length : {0, 1, 7, 8, 9, 12, 20, 40, 272, 273, 4096}) {
            for (const std::size_t fds : {0, 1, 9, 100}) {
                if (fds > 1 && length != 8 && length != 40) continue;
                const Connection connection(disk_.socket());
                try {
                    connection.send(static_cast<Message>(message), Bytes(length, std::byte{0xff}),
                                    std::vector<int>(fds, null.get()));
                    static_cast<void>(connection.ask_number(Message::get_features));
                } catch (const std::runtime_error&) {  // also another reply
                }
            }
        }
    }
    expect_serves_the_next();
    expect_nothing_left(before);
}

TEST_F(HostileGuestTest, MessagesThatAreNone) {
    struct Raw {
        const char* name;
        Bytes bytes;
    };
    const auto header = [](std::uint32_t message, std::uint32_t flags, std::uint32_t size) {
        return payload(front::Header{static_cast<Message>(message), flags, size});
    };
    for (const auto& [name, bytes] :
         {Raw{"half a header", Bytes(6)}, Raw{"a length of 4 GiB", header(2, 1, 0xffffffff)},
          Raw{"a length of 64 KiB", header(5, 1, 65536)}, Raw{"half a payload", joined({header(2, 1, 8), Bytes(4)})},
          Raw{"no version", joined({header(2, 0, 8), Bytes(8)})},
          Raw{"another version", joined({header(2, 2, 8), Bytes(8)})},
          Raw{"a reply", joined({header(2, 5, 8), Bytes(8)})}, Raw{"zeros", Bytes(100000)},
          Raw{"ones", Bytes(100000, std::byte{0xff})}}) {
        SCOPED_TRACE(name);
        {
            const Connection connection(disk_.socket());
            try {
                connection.send_raw(bytes);
            } catch (const front::Disconnected&) {
            }
        }
        expect_serves_the_next();
    }
}

TEST_F(HostileGuestTest, MessagesInAnyOrder) {
    auto random = Random::named("hostile messages");
    const auto file = front::memory_file(MB);
    const Fd event(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    const auto before = descriptors();
    for (unsigned round = 0; round < 60 * effort(); ++round) {
        FrontEnd front(disk_.socket(), {.queues = 2});
        if (random.chance(70)) front.start();
        try {
            for (int i = 0; i < 40; ++i) {
                const auto index = static_cast<std::uint32_t>(random.pick({0U, 0U, 1U, 1U, 2U, 255U, ~0U}));
                const auto number = static_cast<std::uint32_t>(
                    random.pick({0U, 1U, 1U, 2U, 3U, 128U, 1024U, 32768U, 65535U, 65536U, ~0U}));
                const auto memory = front.memory().user(front.queue(index == 1).descriptors_address());
                const auto address = random.pick({memory, memory, memory + 4096, memory + 8, std::uint64_t{0}});
                const auto fd = random.pick({file.get(), event.get()});
                switch (random.below(14)) {
                    case 0: front.set(Message::set_vring_num, bytes_of(VringState{index, number})); break;
                    case 1: front.set(Message::set_vring_base, bytes_of(VringState{index, number})); break;
                    case 2:
                        front.set(Message::set_vring_addr,
                                  bytes_of(VringAddress{index, number & 1, address, address, address, number}));
                        break;
                    case 3: front.set(Message::set_vring_enable, bytes_of(VringState{index, number})); break;
                    case 4: static_cast<void>(front.stop_queue(index)); break;
                    case 5:
                        front.set(random.pick({Message::set_vring_kick, Message::set_vring_call}),
                                  bytes_of(std::uint64_t{index & 0xff}), std::array{fd});
                        break;
                    case 6:
                        front.set(random.pick({Message::set_vring_kick, Message::set_vring_call}),
                                  bytes_of(std::uint64_t{index & 0xff} | 0x100));
                        break;
                    case 7: {
                        const auto size = random.pick<std::uint64_t>({0, 5000, MB, std::uint64_t{1} << 62});
                        const auto offset = random.pick<std::uint64_t>({0, 1, 4096});
                        const front::InflightArea area{size, offset, static_cast<std::uint16_t>(number),
                                                       static_cast<std::uint16_t>(number)};
                        front.set(Message::set_inflight_fd, bytes_of(area), std::array{fd});
                        break;
                    }
                    case 8:
                        static_cast<void>(front.connection().ask(
                            Message::set_log_base,
                            payload(random.pick({std::uint64_t{0}, MB, ~std::uint64_t{0}}), std::uint64_t{0}),
                            std::array{fd}));
                        break;
                    case 9: front.set(Message::reset_owner); break;
                    case 10: front.set(Message::reset_device); break;
                    case 11:
                        front.set(
                            Message::set_features,
                            bytes_of(front.offered_features() & ~front::bit(static_cast<unsigned>(random.below(40)))));
                        break;
                    case 12: front.set(Message::set_status, bytes_of(std::uint64_t{number})); break;
                    default: front.queue(index == 1).kick();
                }
            }
        } catch (const std::runtime_error&) {
        }
    }
    expect_serves_the_next();
    expect_nothing_left(before);
}

TEST_F(HostileGuestTest, RecordsOfRequestsInFlightThatAreWrong) {
    auto random = Random::named("hostile records");
    for (int round = 0; round < 30; ++round) {
        FrontEnd front(disk_.socket(), {.queues = 2});
        front.start();
        expect_reads(front, 0);
        constexpr std::uint64_t size = 64 * 1024;
        const auto file = front::memory_file(size);
        Bytes record(size);
        for (auto& byte : record)
            byte = static_cast<std::byte>(random.chance(50) ? random.below(256) : random.below(2));
        if (round % 2 == 0) {
            // A version that the server knows, and the right number of descriptors.
            const std::array<std::uint16_t, 2> head = {1, 128};
            for (const std::size_t at : {8, 8 + 16 + 128 * 16}) std::memcpy(record.data() + at, head.data(), 4);
        }
        ASSERT_EQ(pwrite(file.get(), record.data(), record.size(), 0), static_cast<ssize_t>(record.size()));
        try {
            front.set(Message::set_inflight_fd, bytes_of(front::InflightArea{size, 0, 2, 128}), std::array{file.get()});
            front.queue(0).kick();
            static_cast<void>(front.queue(0).pop(milliseconds(5)));
            if (round % 3 == 0 && ftruncate(file.get(), 0) != 0) throw std::logic_error("ftruncate");
            front.queue(0).push(0);
            static_cast<void>(front.queue(0).pop(milliseconds(5)));
        } catch (const std::runtime_error&) {
        }
    }
    // A request of a record that was made up may be a write.
    FrontEnd front(disk_.socket());
    front.start();
    EXPECT_EQ(front.write(0, contents()), VIRTIO_BLK_S_OK);
    expect_reads(front, 0);
}

TEST_F(HostileGuestTest, LogsThatAreTooShort) {
    for (const std::uint64_t size : {0, 1, 8, 4096}) {
        const auto file = front::memory_file(size);
        FrontEnd front(disk_.socket(), {.queues = 2});
        front.start();
        try {
            static_cast<void>(
                front.connection().ask(Message::set_log_base, payload(size, std::uint64_t{0}), std::array{file.get()}));
            front.set(Message::set_features, bytes_of(front.offered_features()));
            expect_reads(front, 1);
            ASSERT_EQ(ftruncate(file.get(), 0), 0);
            Bytes sector(512);
            static_cast<void>(front.read(0, sector, 1));
        } catch (const front::Disconnected&) {
        } catch (const front::Refused&) {
        }
    }
    expect_serves_the_next();
}

TEST_F(HostileGuestTest, ManyConnections) {
    const auto before = descriptors();
    {
        // All but the first wait.
        std::vector<std::unique_ptr<Connection>> connections;
        for (int i = 0; i < 10; ++i) connections.push_back(std::make_unique<Connection>(disk_.socket()));
    }
    for (int i = 0; i < 300; ++i) {
        const Connection connection(disk_.socket());
        connection.send(Message::get_features);
    }
    expect_serves_the_next();
    expect_nothing_left(before);
}

}  // namespace
}  // namespace qcow::test
