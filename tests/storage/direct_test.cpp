#include "storage/direct.h"

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <latch>
#include <thread>

#include "storage/pass_through.h"
#include "support/bytes.h"
#include "support/disks.h"
#include "support/effort.h"
#include "support/random.h"
#include "support/result.h"
#include "support/scattered.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;

constexpr DirectAlignment alignment{512, 64};

/// What direct I/O is like: refuses what is not aligned.
class Picky final : public PassThrough {
public:
    using PassThrough::PassThrough;

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        if (!suits(at, to)) return std::unexpected(Error{Errc::io, "read", "not aligned"});
        return inner().read(at, to);
    }
    Result<void> write(HostOffset at, ConstBuffers from) override {
        if (!from.empty() && !suits(at, from)) return std::unexpected(Error{Errc::io, "write", "not aligned"});
        return inner().write(at, from);
    }
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        if (at.value < must(size()) && (at.value | length) % alignment.block != 0)
            return std::unexpected(Error{Errc::io, "write_zeroes", "not aligned"});
        return inner().write_zeroes(at, length);
    }

private:
    template <class Byte>
    static bool suits(HostOffset at, BasicBuffers<Byte> memory) {
        for (const auto piece : memory) {
            if (piece.size() % alignment.block != 0) return false;
            if (reinterpret_cast<std::uintptr_t>(piece.data()) % alignment.memory != 0) return false;
        }
        return at.value % alignment.block == 0;
    }
};

std::shared_ptr<Storage> direct_memory(Bytes bytes = {}) {
    return direct_storage(std::make_shared<Picky>(memory_storage(std::move(bytes))), alignment);
}

/// Takes its time over every step, so that threads meet between them.
class Slow final : public PassThrough {
    template <class Step>
    static auto slowly(const Step& step) {
        auto result = step();
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        return result;
    }

public:
    using PassThrough::PassThrough;

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        return slowly([&] { return inner().read(at, to); });
    }
    Result<void> write(HostOffset at, ConstBuffers from) override {
        return slowly([&] { return inner().write(at, from); });
    }
    Result<void> resize(std::uint64_t size) override {
        return slowly([&] { return inner().resize(size); });
    }
};

std::shared_ptr<Storage> slow_direct_memory() {
    return direct_storage(std::make_shared<Slow>(memory_storage()), alignment);
}

/// Random requests of all kinds, held against an array.
class Against {
public:
    Against(Storage& storage, Random random) : storage_(storage), random_(std::move(random)) {}

    void run(unsigned steps) {
        for (unsigned i = 0; i < steps && !testing::Test::HasFailure(); ++i) {
            step();
            ASSERT_EQ(must(storage_.size()), expected_.size()) << "step " << i << ", " << replay_hint();
        }
        read(0, expected_.size());
    }

    [[nodiscard]] const Bytes& contents() const { return expected_; }

private:
    static constexpr std::uint64_t largest = 3'000'000;

    void step() {
        const auto grain = random_.pick({std::uint64_t{1}, std::uint64_t{512}, std::uint64_t{4096}});
        const auto at = random_.below(largest) / grain * grain;
        const auto most = random_.pick({std::uint64_t{20}, std::uint64_t{5000}, largest});
        const auto length = std::min((random_.below(most) + grain - 1) / grain * grain, largest - at);
        const auto dice = random_.below(100);
        if (dice < 45) return write(at, length);
        if (dice < 80) return read(at, length);
        if (dice < 95) return zero(at, length);
        must(storage_.resize(at));
        expected_.resize(at);
    }

    /// Memory that is aligned, or not at all.
    std::span<std::byte> memory(std::uint64_t length) {
        buffer_.resize(length + 8192);
        const auto address = reinterpret_cast<std::uintptr_t>(buffer_.data());
        const auto skipped = random_.chance(50) ? 4096 - address % 4096 : random_.below(4096);
        return std::span(buffer_).subspan(skipped, length);
    }

    /// In one piece, in two that are as aligned as the whole is, or in any number of pieces.
    template <class Byte>
    std::vector<std::span<Byte>> cut(std::span<Byte> memory) {
        if (random_.chance(30)) return {memory};
        if (random_.chance(50)) return cut_up(memory, random_);
        const auto first = random_.below(memory.size() + 1) / 4096 * 4096;
        return {memory.first(first), memory.subspan(first)};
    }

    void write(std::uint64_t at, std::uint64_t length) {
        const auto text = random_.bytes(length);
        const auto from = memory(length);
        std::ranges::copy(std::as_bytes(std::span(text)), from.begin());
        const auto pieces = cut(std::span<const std::byte>(from));
        must(storage_.write({at}, ConstBuffers(pieces)));
        if (length != 0) expected_.resize(std::max<std::size_t>(expected_.size(), at + length));
        std::ranges::copy(from, expected_.begin() + static_cast<std::ptrdiff_t>(std::min(at, expected_.size())));
    }

    void read(std::uint64_t at, std::uint64_t length) {
        const auto to = memory(length);
        std::ranges::fill(to, std::byte{0xee});
        const auto there = std::min<std::uint64_t>(length, expected_.size() - std::min(at, expected_.size()));
        const auto pieces = cut(to);
        ASSERT_EQ(must(storage_.read({at}, Buffers(pieces))), there);
        ASSERT_TRUE(std::equal(to.begin(), to.begin() + static_cast<std::ptrdiff_t>(there),
                               expected_.begin() + static_cast<std::ptrdiff_t>(std::min(at, expected_.size()))));
        ASSERT_TRUE(std::ranges::all_of(to.subspan(there), [](std::byte byte) { return byte == std::byte{0}; }));
    }

    void zero(std::uint64_t at, std::uint64_t length) {
        must(storage_.write_zeroes({at}, length));
        const auto begin = std::min(at, expected_.size());
        std::fill_n(expected_.begin() + static_cast<std::ptrdiff_t>(begin), std::min(length, expected_.size() - begin),
                    std::byte{0});
    }

    Storage& storage_;
    Random random_;
    Bytes expected_;
    Bytes buffer_;
};

TEST(DirectStorage, TakesRequestsOfAnyAlignment) {
    for (unsigned i = 0; i < 10 * effort(); ++i) {
        const auto storage = direct_memory();
        Against(*storage, Random::named("direct" + std::to_string(i))).run(100);
    }
}

TEST(DirectStorage, IsNoLongerThanWhatWasWritten) {
    const auto storage = direct_memory(repeated(700, 1));
    must(storage->write({690}, text_bytes("x")));
    EXPECT_EQ(must(storage->size()), 700U);
    must(storage->write({695}, text_bytes("0123456789")));
    EXPECT_EQ(must(storage->size()), 705U);
    must(storage->write({5000}, {}));
    EXPECT_EQ(must(storage->size()), 705U);
    must(storage->write_zeroes({~std::uint64_t{0}}, ~std::uint64_t{0}));
    must(storage->write_zeroes({700}, ~std::uint64_t{0}));
    EXPECT_EQ(must(storage->size()), 705U);
    EXPECT_FALSE(storage->write({~std::uint64_t{0}}, text_bytes("x")));
}

TEST(DirectStorage, KeepsWhatNeighboursWriteAtTheSameTime) {
    // Stripes narrower than a block, each thread its own ones, while the file grows.
    constexpr std::uint64_t stripe = 100;
    constexpr unsigned threads = 4;
    const auto storage = slow_direct_memory();
    std::vector<std::jthread> workers;
    for (unsigned t = 0; t < threads; ++t) {
        workers.emplace_back([&, t] {
            for (std::uint64_t i = t; i < 4000; i += threads)
                must(storage->write({i * stripe}, repeated(stripe, static_cast<std::uint8_t>(i % 251))));
        });
    }
    workers.clear();
    ASSERT_EQ(must(storage->size()), 4000 * stripe);
    for (std::uint64_t i = 0; i < 4000; ++i) {
        Bytes read(stripe);
        must(storage->read({i * stripe}, read));
        ASSERT_EQ(read, repeated(stripe, static_cast<std::uint8_t>(i % 251))) << i;
    }
}

TEST(DirectStorage, CutsOffNothingThatIsWrittenBehindTheEndAtTheSameTime) {
    for (unsigned round = 0; round < 200; ++round) {
        const auto storage = slow_direct_memory();
        // Parts of one block and what lies behind them, in every order.
        const std::array<std::pair<std::uint64_t, std::size_t>, 4> writes = {
            {{0, 100}, {100, 200}, {512, 512}, {1024, 300}}};
        std::latch start(writes.size());
        std::vector<std::jthread> workers;
        for (const auto& [at, length] : writes) {
            workers.emplace_back([&] {
                start.arrive_and_wait();
                must(storage->write({at}, repeated(length, static_cast<std::uint8_t>(length % 251))));
            });
        }
        workers.clear();
        ASSERT_EQ(must(storage->size()), 1324U);
        Bytes read(1324);
        must(storage->read({0}, read));
        ASSERT_EQ(read, joined({repeated(100, 100), repeated(200, 200), repeated(212, 0), repeated(512, 512 % 251),
                                repeated(300, 300 % 251)}));
    }
}

TEST(DirectStorage, IsNotTakenInByAnEndThatIsCutAgain) {
    // Both end in the same block: whoever comes second must not believe that the file reaches to the end of it.
    for (unsigned round = 0; round < 200; ++round) {
        const auto storage = slow_direct_memory();
        std::latch start(2);
        std::vector<std::jthread> workers;
        for (const std::uint64_t end : {100, 300}) {
            workers.emplace_back([&, end] {
                start.arrive_and_wait();
                must(storage->write({end - 100}, repeated(100, static_cast<std::uint8_t>(end % 251))));
            });
        }
        workers.clear();
        ASSERT_EQ(must(storage->size()), 300U);
    }
}

/// On a disk: what is in memory has no direct I/O, or one that is not.
class DirectFile : public testing::Test {
protected:
    void SetUp() override {
        write_file(path(), "");
        const auto storage = open_file(path(), {.writable = true, .direct = true});
        if (!storage && storage.error().code == Errc::unsupported) GTEST_SKIP() << storage.error().message();
    }

    [[nodiscard]] std::string path() const { return directory_ / "disk"; }

private:
    TemporaryDirectory directory_{on_a_disk};
};

TEST_F(DirectFile, TakesRequestsOfAnyAlignment) {
    for (unsigned i = 0; i < 2 * effort(); ++i) {
        write_file(path(), "");
        const auto storage = must(open_file(path(), {.writable = true, .direct = true}));
        Against against(*storage, Random::named("file" + std::to_string(i)));
        against.run(80);
        must(storage->flush());
        EXPECT_TRUE(file_bytes(path()) ==
                    std::string(reinterpret_cast<const char*>(against.contents().data()), against.contents().size()));
    }
}

TEST_F(DirectFile, ReadsAnOddEnd) {
    write_file(path(), "0123456789");
    const auto storage = must(open_file(path(), {.direct = true}));
    Bytes read(4);
    EXPECT_EQ(must(storage->read({8}, read)), 2U);
    EXPECT_EQ(read, joined({text_bytes("89"), repeated(2, 0)}));
    alignas(4096) std::array<std::byte, 8192> aligned;
    EXPECT_EQ(must(storage->read({0}, aligned)), 10U);
    EXPECT_EQ(aligned[10], std::byte{0});
    EXPECT_EQ(must(storage->read({~std::uint64_t{0}}, read)), 0U);
    EXPECT_TRUE(fails(storage->write({0}, text_bytes("x")), Errc::read_only, {path()}));
    EXPECT_TRUE(fails(storage->write_zeroes({0}, 5), Errc::read_only, {path()}));
    EXPECT_EQ(file_bytes(path()), "0123456789");
}

TEST_F(DirectFile, SaysWhereThereIsNone) {
    // The kernel's own files have none anywhere.
    EXPECT_TRUE(fails(open_file("/proc/version", {.direct = true}), Errc::unsupported, {"/proc/version", "O_DIRECT"}));
}

}  // namespace
}  // namespace qcow
