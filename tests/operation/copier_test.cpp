#include "operation/copier.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/try.h"
#include "qcow/storage.h"
#include "support/bytes.h"
#include "support/result.h"
#include "support/sample.h"

namespace qcow::test {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::IsEmpty;

constexpr std::uint64_t piece = 256 * KiB;

/// A disk with the extents that it is given. The bytes of data at `at` are a function of `at`; what is not data reads
/// as zeros.
class Source final : public Disk {
public:
    using Kind = Extent::Kind;

    /// Adds an extent behind the others.
    Source& add(Kind kind, std::uint64_t length, bool by_kernel = false) {
        Extent extent{.start = {size_}, .length = length, .kind = kind};
        if (by_kernel) {
            extent.host = HostOffset{size_ + host_of_first};
            extent.storage = file.get();
        }
        extents_.push_back(extent);
        size_ += length;
        return *this;
    }

    [[nodiscard]] std::uint64_t size() const override { return size_; }
    [[nodiscard]] std::uint64_t block_size() const override { return blocks; }

    static std::byte byte_at(std::uint64_t at) { return static_cast<std::byte>(scrambled(at / 512) | 1); }

    static constexpr std::uint64_t host_of_first = 1 << 20;
    std::uint64_t blocks = 4096;
    std::shared_ptr<Storage> file = memory_storage({}, "source");
    std::function<Result<void>(GuestOffset, std::uint64_t length)> on_read, on_extent;
    std::atomic<std::uint64_t> bytes_read = 0;

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        bytes_read += to.size();
        if (on_read) TRY_VOID(on_read(at, to.size()));
        Bytes bytes(to.size());
        for (const auto& extent : extents_) {
            if (extent.kind != Kind::data) continue;
            const auto begin = std::max(at, extent.start);
            const auto end = std::min(at + to.size(), extent.start + extent.length);
            for (auto next = begin; next < end;) {
                const auto sector_end = std::min(end, GuestOffset{align_down(next.value, 512) + 512});
                std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(next - at), sector_end - next,
                            byte_at(next.value));
                next = sector_end;
            }
        }
        scatter(bytes, to);
        return {};
    }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        if (on_extent) TRY_VOID(on_extent(at, limit));
        for (auto extent : extents_) {
            if (at < extent.start || at >= extent.start + extent.length) continue;
            const auto skip = at - extent.start;
            if (extent.host) *extent.host += skip;
            extent.start = at;
            extent.length = std::min(extent.length - skip, limit);
            return extent;
        }
        return fail(Errc::io, "source", "no extent");
    }

private:
    std::uint64_t size_ = 0;
    std::vector<Extent> extents_;
};

/// What a target was handed.
struct Call {
    enum class Kind : std::uint8_t { write, zeroes, kernel };
    Kind kind = Kind::write;
    std::uint64_t at = 0;
    std::uint64_t length = 0;
    friend bool operator==(const Call&, const Call&) = default;
};
void PrintTo(const Call& call, std::ostream* out) {
    *out << std::array{"write", "zeroes", "kernel"}[static_cast<std::size_t>(call.kind)] << ' ' << call.at << '+'
         << call.length;
}
Call written(std::uint64_t at, std::uint64_t length) { return {Call::Kind::write, at, length}; }
Call zeroes(std::uint64_t at, std::uint64_t length) { return {Call::Kind::zeroes, at, length}; }
Call by_kernel(std::uint64_t at, std::uint64_t length) { return {Call::Kind::kernel, at, length}; }

/// Takes note of all that it is handed, and holds the bytes against those of a Source.
class Target final : public CopyTarget {
public:
    explicit Target(bool any_order = false, std::uint64_t block_size = 4096)
        : any_order_(any_order), block_size_(block_size) {}

    [[nodiscard]] std::uint64_t block_size() const override { return block_size_; }
    [[nodiscard]] bool any_order() const override { return any_order_; }

    Result<void> prepare(Piece& given) const override {
        if (on_prepare) TRY_VOID(on_prepare(given));
        EXPECT_TRUE(given.runs.empty()) << "left over from another piece";
        given.runs.push_back({PreparedRun::Kind::data, given.bytes.size(), given.bytes});
        return {};
    }
    Result<void> write(Piece& given) override {
        const Inside entered(*this);
        EXPECT_EQ(given.runs.size(), 1U) << "prepared once";
        EXPECT_EQ(given.runs.front().length, given.bytes.size());
        if (check) check(given);
        return note(written(given.at.value, given.bytes.size()));
    }
    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) override {
        const Inside entered(*this);
        return note(zeroes(at.value, length));
    }
    Result<std::uint64_t> copy_from(GuestOffset at, const Storage& source, HostOffset from,
                                    std::uint64_t length) override {
        const Inside entered(*this);
        EXPECT_EQ(source.name(), "source");
        EXPECT_EQ(from.value, at.value + Source::host_of_first);
        TRY_VOID(note(by_kernel(at.value, length)));
        return kernel_copies ? kernel_copies(length) : length;
    }

    /// In the order in which they came.
    [[nodiscard]] std::vector<Call> calls() const {
        const std::lock_guard lock(mutex_);
        return calls_;
    }
    [[nodiscard]] std::vector<Call> sorted_calls() const {
        auto sorted = calls();
        std::ranges::sort(sorted, {}, [](const Call& call) { return std::pair(call.at, call.kind); });
        return sorted;
    }

    std::function<Result<void>(Piece&)> on_prepare;
    std::function<Result<void>(const Call&)> on_call;
    std::function<std::uint64_t(std::uint64_t)> kernel_copies;
    std::function<void(const Piece&)> check;
    std::atomic<int> inside = 0, most_inside = 0;

private:
    struct Inside {
        explicit Inside(Target& of) : target(of) {
            const int now = ++target.inside;
            int most = target.most_inside;
            while (most < now && !target.most_inside.compare_exchange_weak(most, now)) {
            }
        }
        Inside(const Inside&) = delete;
        Inside& operator=(const Inside&) = delete;
        ~Inside() { --target.inside; }
        Target& target;
    };

    Result<void> note(const Call& call) {
        EXPECT_TRUE(is_aligned(call.at, block_size_));
        EXPECT_GT(call.length, 0U);
        {
            const std::lock_guard lock(mutex_);
            calls_.push_back(call);
        }
        return on_call ? on_call(call) : Result<void>();
    }

    const bool any_order_;
    const std::uint64_t block_size_;
    mutable std::mutex mutex_;
    std::vector<Call> calls_;
};

void expect_source_bytes(const Piece& given) {
    for (std::size_t i = 0; i < given.bytes.size(); i += 512)
        ASSERT_EQ(given.bytes[i], Source::byte_at(given.at.value + i)) << given.at.value + i;
}

/// All of the disk is handed over once; what begins behind the front is aligned, so what comes before ends so.
void expect_complete(const std::vector<Call>& sorted, std::uint64_t size) {
    std::uint64_t end = 0;
    for (const auto& call : sorted) {
        EXPECT_EQ(call.at, end);
        end = call.at + call.length;
    }
    EXPECT_EQ(end, size);
}

std::unexpected<Error> broken(Errc code = Errc::io) { return fail(code, "", "broken"); }

/// By the number of workers and whether the target takes any order.
class CopierTest : public testing::TestWithParam<std::tuple<unsigned, bool>> {
protected:
    [[nodiscard]] unsigned workers() const { return std::get<0>(GetParam()); }
    [[nodiscard]] bool any_order() const { return std::get<1>(GetParam()); }
    [[nodiscard]] CopyOptions options() const { return {.workers = workers()}; }

    Source source_;
    Target target_{any_order()};
};

using Kind = Source::Kind;

TEST_P(CopierTest, DataAreHandedOverInPieces) {
    source_.add(Kind::data, 9 * piece + 4096);
    target_.check = expect_source_bytes;
    must(copy_to(source_, target_, options()));
    const auto calls = target_.sorted_calls();
    expect_complete(calls, source_.size());
    ASSERT_EQ(calls.size(), 10U);
    for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(calls[i], written(i * piece, piece));
    EXPECT_EQ(source_.bytes_read, source_.size());
    if (!any_order()) {
        EXPECT_EQ(target_.calls(), calls) << "in guest order";
        EXPECT_EQ(target_.most_inside, 1);
    }
}

TEST_P(CopierTest, ZerosAreHandedOverWithoutBeingRead) {
    source_.add(Kind::zero, 10 * MiB).add(Kind::unallocated, MiB).add(Kind::data, 8192).add(Kind::zero, 4096);
    must(copy_to(source_, target_, options()));
    const auto calls = target_.sorted_calls();
    EXPECT_THAT(calls, ElementsAre(zeroes(0, 10 * MiB), zeroes(10 * MiB, MiB), written(11 * MiB, 8192),
                                   zeroes(11 * MiB + 8192, 4096)));
    EXPECT_EQ(source_.bytes_read, 8192U);
}

TEST_P(CopierTest, WithoutSparsenessZerosAreData) {
    source_.add(Kind::zero, piece + 4096).add(Kind::data, 4096, true);
    auto all = options();
    all.sparse_bytes = 0;
    must(copy_to(source_, target_, all));
    expect_complete(target_.sorted_calls(), source_.size());
    for (const auto& call : target_.calls()) EXPECT_EQ(call.kind, Call::Kind::write);
    EXPECT_EQ(source_.bytes_read, source_.size());
}

/// Extents may begin and end anywhere, targets want whole blocks.
TEST_P(CopierTest, ABlockOfSeveralExtentsIsRead) {
    source_.add(Kind::data, 1000).add(Kind::zero, 5000).add(Kind::data, 10'000, true).add(Kind::zero, 100);
    must(copy_to(source_, target_, options()));
    const auto calls = target_.sorted_calls();
    expect_complete(calls, source_.size());
    EXPECT_THAT(calls,
                ElementsAre(written(0, 4096), written(4096, 4096), by_kernel(8192, 4096), written(12'288, 3812)));
}

TEST_P(CopierTest, TheLastBlockNeedNotBeFull) {
    source_.add(Kind::data, 4096).add(Kind::zero, 4096 + 10);
    must(copy_to(source_, target_, options()));
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(written(0, 4096), zeroes(4096, 4106)));
}

TEST_P(CopierTest, APieceIsAtLeastABlockOfEitherSide) {
    source_.blocks = 2 * MiB;
    source_.add(Kind::data, 4 * MiB);
    must(copy_to(source_, target_, options()));
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(written(0, 2 * MiB), written(2 * MiB, 2 * MiB)));

    Source small_blocks;
    small_blocks.add(Kind::zero, 512).add(Kind::data, 4 * MiB - 512);
    Target large(any_order(), 2 * MiB);
    must(copy_to(small_blocks, large, options()));
    EXPECT_THAT(large.sorted_calls(), ElementsAre(written(0, 2 * MiB), written(2 * MiB, 2 * MiB)));
}

TEST_P(CopierTest, PiecesEndAtMultiplesOfTheirSize) {
    source_.add(Kind::zero, 4096).add(Kind::data, 2 * piece);
    must(copy_to(source_, target_, options()));
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(zeroes(0, 4096), written(4096, piece - 4096), written(piece, piece),
                                                    written(2 * piece, 4096)));
}

TEST_P(CopierTest, AnEmptyDiskIsNothing) {
    must(copy_to(source_, target_, options()));
    EXPECT_THAT(target_.calls(), IsEmpty());
}

/// A request to stop waits for one stretch.
TEST_P(CopierTest, StretchesAreNotLongerThanAGibibyte) {
    source_.add(Kind::zero, 2 * GiB + 4096);
    must(copy_to(source_, target_, options()));
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(zeroes(0, GiB), zeroes(GiB, GiB), zeroes(2 * GiB, 4096)));
}

TEST_P(CopierTest, OfAVastDiskStretchesAreLonger) {
    constexpr std::uint64_t size = std::uint64_t{1} << 60;
    source_.add(Kind::zero, size);
    must(copy_to(source_, target_, options()));
    EXPECT_EQ(target_.calls().size(), 65'536U);
    EXPECT_EQ(target_.sorted_calls().back(), zeroes(size - size / 65'536, size / 65'536));
}

TEST_P(CopierTest, TheKernelCopiesWhatItCan) {
    source_.add(Kind::data, MiB, true).add(Kind::zero, 4096).add(Kind::data, 2 * GiB, true).add(Kind::data, 4096);
    must(copy_to(source_, target_, options()));
    const auto calls = target_.sorted_calls();
    expect_complete(calls, source_.size());
    EXPECT_EQ(calls.front(), by_kernel(0, piece)) << "a trial";
    EXPECT_EQ(calls[1], by_kernel(piece, MiB - piece));
    EXPECT_EQ(calls.back(), written(source_.size() - 4096, 4096));
    for (const auto& call : calls) EXPECT_LE(call.length, GiB);
    EXPECT_EQ(source_.bytes_read, 4096U);
}

TEST_P(CopierTest, WhatTheKernelLeavesIsReadAndItIsNotAskedAgain) {
    for (const std::uint64_t done : {0, 8192}) {
        Source source;
        source.add(Kind::data, 5 * piece, true);
        Target target(any_order());
        target.check = expect_source_bytes;
        target.kernel_copies = [&](std::uint64_t) {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));  // others would be asked meanwhile
            return done;
        };
        must(copy_to(source, target, options()));
        auto calls = target.sorted_calls();
        const auto asked = std::ranges::count(calls, Call::Kind::kernel, &Call::kind);
        EXPECT_EQ(asked, 1) << "the others wait for the trial";
        EXPECT_EQ(source.bytes_read, source.size() - done);
        const auto trial = std::ranges::find(calls, Call::Kind::kernel, &Call::kind);
        EXPECT_EQ(*trial, by_kernel(0, piece));
        trial->length = done;
        std::ranges::sort(calls, {}, [](const Call& call) { return std::pair(call.at, call.length); });
        expect_complete(calls, source.size());
    }
}

/// As preallocated clusters are.
TEST_P(CopierTest, ZerosThatHaveAPlaceAreZeros) {
    source_.add(Kind::zero, piece, true).add(Kind::data, piece, true);
    must(copy_to(source_, target_, options()));
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(zeroes(0, piece), by_kernel(piece, piece)));
}

TEST_P(CopierTest, ProgressIsInGuestBytes) {
    source_.add(Kind::data, 3 * piece).add(Kind::zero, GiB).add(Kind::data, 100);
    std::vector<std::uint64_t> told;
    std::atomic<int> inside = 0;
    auto with_progress = options();
    with_progress.control.progress = [&](std::uint64_t done, std::uint64_t total) {
        EXPECT_EQ(++inside, 1);
        EXPECT_EQ(total, source_.size());
        told.push_back(done);
        --inside;
    };
    must(copy_to(source_, target_, with_progress));
    EXPECT_EQ(told.size(), target_.calls().size());
    EXPECT_TRUE(std::ranges::is_sorted(told, std::ranges::less_equal())) << "it grows each time";
    EXPECT_EQ(told.back(), source_.size());
}

TEST_P(CopierTest, AJobThatIsCancelledBeforeDoesNothing) {
    source_.add(Kind::data, 4 * piece);
    std::stop_source stop;
    stop.request_stop();
    auto cancelled = options();
    cancelled.control.stop = stop.get_token();
    EXPECT_TRUE(fails(copy_to(source_, target_, cancelled), Errc::cancelled));
    EXPECT_THAT(target_.calls(), IsEmpty());
}

TEST_P(CopierTest, AJobEndsSoonAfterItIsCancelled) {
    source_.add(Kind::data, 1000 * piece);
    std::stop_source stop;
    auto cancelled = options();
    cancelled.control.stop = stop.get_token();
    cancelled.control.progress = [&](std::uint64_t, std::uint64_t) { stop.request_stop(); };
    EXPECT_TRUE(fails(copy_to(source_, target_, cancelled), Errc::cancelled));
    EXPECT_GE(target_.calls().size(), 1U);
    EXPECT_LE(target_.calls().size(), 1 + std::size_t{8} * workers());
}

/// Each step fails at some place, with an error that no other one has.
TEST_P(CopierTest, TheFirstErrorEndsTheCopy) {
    const auto expect_end = [&](auto&& arrange) {
        Source source;
        source.add(Kind::data, 4 * piece).add(Kind::zero, piece).add(Kind::data, piece, true);
        source.add(Kind::data, 500 * piece);
        Target target(any_order());
        arrange(source, target);
        EXPECT_TRUE(fails(copy_to(source, target, options()), Errc::access_denied, {"broken"}));
        // Those who write for themselves may get far before they learn of it.
        if (!any_order()) {
            EXPECT_LT(target.calls().size(), 10U);
        }
    };
    const auto fail_at = [](std::uint64_t place) {
        return [place](GuestOffset at, std::uint64_t length) -> Result<void> {
            if (at.value <= place && place < at.value + length) return broken(Errc::access_denied);
            return {};
        };
    };
    const auto fail_call = [](Call::Kind kind) {
        return [kind](const Call& call) -> Result<void> {
            if (call.kind == kind) return broken(Errc::access_denied);
            return {};
        };
    };
    expect_end([&](Source& source, Target&) { source.on_read = fail_at(3 * piece); });
    expect_end([&](Source& source, Target&) {
        source.on_extent = [](GuestOffset at, std::uint64_t) {
            return at.value >= 4 * piece ? broken(Errc::access_denied) : Result<void>();
        };
    });
    expect_end([&](Source&, Target& target) {
        target.on_prepare = [](Piece& given) {
            return given.at.value == 2 * piece ? broken(Errc::access_denied) : Result<void>();
        };
    });
    expect_end([&](Source&, Target& target) { target.on_call = fail_call(Call::Kind::write); });
    expect_end([&](Source&, Target& target) { target.on_call = fail_call(Call::Kind::zeroes); });
    expect_end([&](Source&, Target& target) { target.on_call = fail_call(Call::Kind::kernel); });
}

TEST_P(CopierTest, MemoryThatRunsOutIsAnError) {
    source_.add(Kind::data, 20 * piece);
    target_.on_prepare = [](Piece& given) -> Result<void> {
        if (given.at.value == 4 * piece) throw std::bad_alloc();
        return {};
    };
    EXPECT_TRUE(fails(copy_to(source_, target_, options()), Errc::no_memory));
}

/// As a disk of which a layer is encrypted: not even its zeros are copied.
TEST_P(CopierTest, ADiskOutOfReachIsNotCopied) {
    source_.add(Kind::zero, MiB);
    source_.on_read = [](GuestOffset, std::uint64_t length) {
        return length == 0 ? broken(Errc::encrypted) : Result<void>();
    };
    EXPECT_TRUE(fails(copy_to(source_, target_, options()), Errc::encrypted));
    EXPECT_THAT(target_.calls(), IsEmpty());
}

class CopierSalvageTest : public CopierTest {
protected:
    Result<void> salvage() {
        auto with_losses = options();
        with_losses.salvage = &losses_;
        return copy_to(source_, target_, with_losses);
    }

    /// The extent at `at` cannot be told, for the reason that `error` is.
    void damage_extent(std::uint64_t at, Error error) {
        source_.on_extent = [at, error](GuestOffset asked, std::uint64_t) -> Result<void> {
            return asked.value == at ? std::unexpected(error) : Result<void>();
        };
    }

    Losses losses_;
};

TEST_P(CopierSalvageTest, AnExtentThatCannotBeToldBecomesZeros) {
    source_.add(Kind::data, piece).add(Kind::data, piece).add(Kind::zero, piece);
    damage_extent(piece, {Errc::corrupt, "l2", "damaged", {{piece}, piece}});
    must(salvage());
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(written(0, piece), zeroes(piece, piece), zeroes(2 * piece, piece)));
    EXPECT_EQ(losses_.bytes, piece);
    ASSERT_EQ(losses_.ranges.size(), 1U);
    EXPECT_EQ(losses_.ranges[0].bytes.start, GuestOffset{piece});
    EXPECT_EQ(losses_.ranges[0].bytes.length, piece);
    EXPECT_EQ(losses_.ranges[0].why.code, Errc::corrupt);
}

TEST_P(CopierSalvageTest, WithoutItThatIsAnError) {
    source_.add(Kind::data, piece).add(Kind::data, piece);
    damage_extent(piece, {Errc::corrupt, "l2", "damaged", {{piece}, piece}});
    EXPECT_TRUE(fails(copy_to(source_, target_, options()), Errc::corrupt, {"damaged"}));
}

/// A damaged table may map more than the disk has.
TEST_P(CopierSalvageTest, NoMoreIsLostThanTheDiskHas) {
    source_.add(Kind::data, piece).add(Kind::data, 4096 + 10);
    damage_extent(piece, {Errc::corrupt, "l1", "damaged", {{piece}, GiB}});
    must(salvage());
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(written(0, piece), zeroes(piece, 4106)));
    EXPECT_EQ(losses_.bytes, 4106U);
}

/// Then what can be read of the block is.
TEST_P(CopierSalvageTest, WhereItIsNotSaidWhatIsLostTheBlockIsRead) {
    const auto unknown = {GuestRange{}, GuestRange{{2 * piece}, piece}, GuestRange{{0}, 10}};
    for (const auto& unreadable : unknown) {
        Source source;
        source.add(Kind::data, 3 * piece);
        Target target(any_order());
        source.on_extent = [&](GuestOffset at, std::uint64_t) -> Result<void> {
            if (at.value != 0 && at.value != 4096) return {};
            return std::unexpected(Error{Errc::corrupt, "l2", "damaged", at.value == 0 ? GuestRange{} : unreadable});
        };
        auto with_losses = options();
        with_losses.salvage = &losses_;
        must(copy_to(source, target, with_losses));
        const auto calls = target.sorted_calls();
        expect_complete(calls, source.size());
        EXPECT_EQ(calls[0], written(0, 4096));
        EXPECT_EQ(calls[1], written(4096, 4096));
        EXPECT_EQ(losses_.bytes, 0U);
    }
}

TEST_P(CopierSalvageTest, ABlockOfWhichAPartIsLostIsRead) {
    source_.add(Kind::data, 1000).add(Kind::data, piece - 1000);
    damage_extent(0, {Errc::corrupt, "l2", "damaged", {{0}, 1000}});
    must(salvage());
    EXPECT_EQ(target_.sorted_calls().front(), written(0, 4096));
    expect_complete(target_.sorted_calls(), piece);
    EXPECT_EQ(losses_.bytes, 0U) << "reading tells what is lost";
}

TEST_P(CopierSalvageTest, WhatFailsForAMomentIsNotLost) {
    source_.add(Kind::zero, piece).add(Kind::zero, piece);
    std::atomic<int> failures = 1;
    source_.on_extent = [&](GuestOffset at, std::uint64_t) -> Result<void> {
        if (at.value == piece && failures-- > 0) return std::unexpected(Error{Errc::io, "", "busy", {{piece}, piece}});
        return {};
    };
    must(salvage());
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(zeroes(0, piece), zeroes(piece, piece)));
    EXPECT_EQ(losses_.bytes, 0U);
}

TEST_P(CopierSalvageTest, WhatMayBeReadAnotherTimeEndsTheCopy) {
    for (const auto code : {Errc::no_memory, Errc::refused_by_policy}) {
        source_.add(Kind::data, piece);
        damage_extent(0, {code, "", "later", {{0}, piece}});
        EXPECT_TRUE(fails(salvage(), code));
    }
}

TEST_P(CopierSalvageTest, BytesThatCannotBeReadBecomeZeros) {
    source_.add(Kind::data, 3 * piece);
    source_.on_read = [](GuestOffset at, std::uint64_t length) -> Result<void> {
        const std::uint64_t bad = piece + 1024;
        if (at.value <= bad && bad < at.value + length) {
            return std::unexpected(Error{Errc::corrupt, "", "stream", {{bad}, 512}});
        }
        return {};
    };
    target_.check = [](const Piece& given) {
        for (std::size_t i = 0; i < given.bytes.size(); i += 512) {
            const auto at = given.at.value + i;
            ASSERT_EQ(given.bytes[i], at == piece + 1024 ? std::byte{0} : Source::byte_at(at)) << at;
        }
    };
    must(salvage());
    expect_complete(target_.sorted_calls(), source_.size());
    EXPECT_EQ(losses_.bytes, 512U);
}

/// The kernel would copy damage unseen.
TEST_P(CopierSalvageTest, EverythingIsRead) {
    source_.add(Kind::data, 2 * piece, true);
    must(salvage());
    EXPECT_THAT(target_.sorted_calls(), ElementsAre(written(0, piece), written(piece, piece)));
}

TEST_P(CopierSalvageTest, LossesAreToldOfACopyThatFails) {
    source_.add(Kind::data, piece).add(Kind::data, 20 * piece);
    damage_extent(0, {Errc::corrupt, "l2", "damaged", {{0}, piece}});
    target_.on_call = [](const Call& call) { return call.at == 3 * piece ? broken(Errc::no_space) : Result<void>(); };
    EXPECT_TRUE(fails(salvage(), Errc::no_space));
    EXPECT_EQ(losses_.bytes, piece);
}

/// Pieces that are held up are written by whoever comes, and in order all the same.
TEST(CopierOrderTest, SlowReadsDoNotChangeTheOrder) {
    Source source;
    source.add(Source::Kind::data, 40 * piece);
    source.on_read = [](GuestOffset at, std::uint64_t) -> Result<void> {
        if (at.value / piece % 8 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        return {};
    };
    Target target;
    must(copy_to(source, target, {.workers = 4}));
    EXPECT_EQ(target.calls(), target.sorted_calls());
    expect_complete(target.calls(), source.size());
    EXPECT_EQ(target.most_inside, 1);
}

TEST(CopierOrderTest, NothingComesAfterAWriteThatFailed) {
    Source source;
    Target target;
    source.add(Source::Kind::data, 50 * piece);
    target.on_call = [](const Call& call) { return call.at == 3 * piece ? broken() : Result<void>(); };
    EXPECT_TRUE(fails(copy_to(source, target, {.workers = 4}), Errc::io));
    EXPECT_THAT(target.calls(), ElementsAre(written(0, piece), written(piece, piece), written(2 * piece, piece),
                                            written(3 * piece, piece)));
}

/// Those who wait for a buffer learn of it.
TEST(CopierOrderTest, AnErrorEndsTheWaitingOfOthers) {
    Source source;
    source.add(Source::Kind::data, 100 * piece);
    Target target;
    target.on_call = [&](const Call&) -> Result<void> {
        for (int i = 0; i < 2000 && source.bytes_read < 16 * piece; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        return broken();
    };
    EXPECT_TRUE(fails(copy_to(source, target, {.workers = 4}), Errc::io));
    EXPECT_EQ(source.bytes_read, 16 * piece) << "four buffers a worker";
}

TEST(CopierOrderTest, TheKernelMayStopInTheMiddle) {
    Source source;
    source.add(Source::Kind::data, 5 * piece, true);
    source.add(Source::Kind::zero, 4096).add(Source::Kind::data, 4096, true);
    Target target;
    target.check = expect_source_bytes;
    target.kernel_copies = [](std::uint64_t length) { return length == piece ? length : 4096; };
    must(copy_to(source, target, {.workers = 1}));
    EXPECT_THAT(target.calls(), ElementsAre(by_kernel(0, piece), by_kernel(piece, 4 * piece),
                                            written(piece + 4096, piece), written(2 * piece + 4096, piece),
                                            written(3 * piece + 4096, piece), written(4 * piece + 4096, piece - 4096),
                                            zeroes(5 * piece, 4096), written(5 * piece + 4096, 4096)));
}

/// A target that takes any order is written by several at once.
TEST(CopierOrderTest, AnyOrderIsUsed) {
    Source source;
    source.add(Source::Kind::data, 16 * piece);
    Target target(true);
    target.on_call = [&](const Call&) -> Result<void> {
        for (int i = 0; i < 2000 && target.most_inside < 2; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return {};
    };
    must(copy_to(source, target, {.workers = 4}));
    EXPECT_GE(target.most_inside, 2);
    expect_complete(target.sorted_calls(), source.size());
}

/// Memory is bounded: a worker does not read on while what it has read cannot be written.
TEST(CopierOrderTest, ReadersWaitForTheWriter) {
    Source source;
    source.add(Source::Kind::data, 100 * piece);
    std::atomic<std::uint64_t> most_ahead = 0;
    Target target;
    std::uint64_t written_bytes = 0;
    target.on_call = [&](const Call& call) -> Result<void> {
        if (call.at < 4 * piece) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        most_ahead = std::max<std::uint64_t>(most_ahead, source.bytes_read - written_bytes);
        written_bytes += call.length;
        return {};
    };
    must(copy_to(source, target, {.workers = 2}));
    EXPECT_LE(most_ahead, 2 * 4 * piece);
}

const auto kinds = testing::Values(std::tuple(1U, false), std::tuple(4U, false), std::tuple(4U, true));
const auto kind_name = [](const auto& instance) {
    const auto& [workers, any_order] = instance.param;
    return fmt::format("{}{}", workers == 1 ? "OneWorker" : "Workers", any_order ? "InAnyOrder" : "InOrder");
};
INSTANTIATE_TEST_SUITE_P(Kinds, CopierTest, kinds, kind_name);
INSTANTIATE_TEST_SUITE_P(Kinds, CopierSalvageTest, kinds, kind_name);

}  // namespace
}  // namespace qcow::test
