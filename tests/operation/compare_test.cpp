// Comparisons of disks: what they find, and what they need not read.

#include "qcow/compare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "base/bits.h"
#include "qcow/create.h"
#include "server/test_disk.h"
#include "support/disks.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {

static void PrintTo(const Difference& difference, std::ostream* out) {
    *out << (difference.kind == Difference::Kind::contents ? "contents [" : "allocation [")
         << difference.bytes.start.value << ", +" << difference.bytes.length << ")";
}

static bool operator==(const Difference& a, const Difference& b) {
    return a.kind == b.kind && a.bytes.start == b.bytes.start && a.bytes.length == b.bytes.length;
}

namespace {

using namespace qcow::test;
using testing::ElementsAre;
using testing::IsEmpty;
using Kind = Difference::Kind;

constexpr auto block = TestDisk::block;

Difference contents(std::uint64_t at, std::uint64_t length) { return {Kind::contents, {{at}, length}}; }
Difference allocation(std::uint64_t at, std::uint64_t length) { return {Kind::allocation, {{at}, length}}; }

struct Compared {
    Comparison comparison;
    std::vector<Difference> differences;
};

/// Compares to the end.
Compared compare_all(Disk& a, Disk& b, CompareOptions options = {}) {
    Compared result;
    options.visit = [&](const Difference& difference) -> Result<void> {
        result.differences.push_back(difference);
        return {};
    };
    result.comparison = must(compare_disks(a, b, options));
    return result;
}

/// Makes the whole disk a hole.
void empty(TestDisk& disk) {
    for (std::uint64_t at = 0; at < disk.size(); at += block) disk.punch(at);
}

/// Two disks with the same random bytes.
struct Pair {
    explicit Pair(std::uint64_t size = 64 * block) : a(size), b(size) {
        auto random = Random::named("compare");
        a.fill(random);
        std::ranges::copy(a.bytes(), b.bytes().begin());
    }

    void change(std::uint64_t at) { b.bytes()[at] ^= std::byte{1}; }

    TestDisk a;
    TestDisk b;
};

TEST(Compare, EqualDisks) {
    Pair disks;
    const auto found = must(compare_disks(disks.a, disks.b));
    EXPECT_TRUE(found.identical);
    EXPECT_FALSE(found.first);
    EXPECT_EQ(found.size_a, 64 * block);
    EXPECT_EQ(found.size_b, 64 * block);
}

TEST(Compare, TheFirstDifferenceIsTheLowestOneWhateverTheWorkers) {
    Pair disks;
    for (const std::uint64_t place : {63 * block, 40 * block, 8 * block + 5, 7 * block + 78, 7 * block + 77}) {
        disks.change(place);
        for (const unsigned workers : {1U, 2U, 8U}) {
            const auto found = must(compare_disks(disks.a, disks.b, {.workers = workers}));
            EXPECT_FALSE(found.identical);
            ASSERT_TRUE(found.first);
            EXPECT_EQ(found.first->bytes.start.value, place);
        }
    }
    disks.a.slow_sector = 7 * block;  // others overtake it
    EXPECT_EQ(must(compare_disks(disks.a, disks.b, {.workers = 8})).first->bytes.start.value, 7 * block + 77);
}

TEST(Compare, AllDifferencesAreRunsOfSectors) {
    Pair disks;
    for (const std::uint64_t at : {1000, 1023, 1024, 2048, 5000}) disks.change(at);
    for (std::uint64_t at = 4 * block - 100; at < 4 * block + 100; ++at) disks.change(at);  // in two pieces
    for (const unsigned workers : {1U, 2U, 8U}) {
        const auto found = compare_all(disks.a, disks.b, {.workers = workers});
        EXPECT_THAT(found.differences, ElementsAre(contents(1000, 25), contents(2048, 1), contents(5000, 1),
                                                   contents(4 * block - 100, 200)));
        EXPECT_EQ(found.comparison.different_bytes, 205U);
        EXPECT_EQ(found.comparison.first->bytes.start.value, 1000U);
    }
}

TEST(Compare, RandomDifferencesAgainstAModel) {
    auto random = Random::named("compare differences");
    for (unsigned round = 0; round < 20; ++round) {
        Pair disks(random.between(1, 20 * block) / 512 * 512 + 512);
        for (std::uint64_t at = 0; at < disks.a.size(); at += block) {
            if (random.chance(30)) disks.a.punch(at);
            if (random.chance(30)) disks.b.punch(at);
        }
        for (unsigned i = 0; i < round; ++i) {
            const auto at = random.below(disks.a.size());
            disks.b.bytes()[at] ^= disks.b.bytes()[at] == std::byte{} ? std::byte{} : std::byte{1};
        }
        std::uint64_t bytes = 0;
        std::uint64_t first = disks.a.size();
        for (std::uint64_t at = 0; at < disks.a.size(); ++at) {
            if (disks.a.bytes()[at] == disks.b.bytes()[at]) continue;
            first = std::min(first, at);
            ++bytes;
        }
        const auto found = compare_all(disks.a, disks.b, {.workers = 3});
        EXPECT_EQ(found.comparison.different_bytes, bytes);
        EXPECT_EQ(found.comparison.identical, bytes == 0);
        const auto stopped = must(compare_disks(disks.a, disks.b));
        for (const auto& comparison : {found.comparison, stopped})
            EXPECT_EQ(comparison.first ? comparison.first->bytes.start.value : disks.a.size(), first);
    }
}

TEST(Compare, WhatIsLongerMustBeZeros) {
    TestDisk a(10 * block);
    TestDisk b(20 * block + 100);  // ends within a sector
    empty(a);
    empty(b);
    must(b.write({15 * block}, std::vector<std::byte>(block)));
    auto found = must(compare_disks(a, b));
    EXPECT_TRUE(found.identical);
    EXPECT_EQ(found.size_b, 20 * block + 512);
    EXPECT_FALSE(must(compare_disks(a, b, {.strict = true})).identical);
    EXPECT_FALSE(must(compare_disks(b, a, {.strict = true})).identical);
    b.bytes()[15 * block + 1] = std::byte{1};
    for (auto* disks : {&a, &b}) {
        found = must(compare_disks(*disks, disks == &a ? b : a));
        EXPECT_FALSE(found.identical);
        EXPECT_EQ(found.first->bytes.start.value, 15 * block + 1);
    }
    EXPECT_THAT(compare_all(a, b, {.strict = true}).differences, ElementsAre(contents(15 * block + 1, 1)));
}

TEST(Compare, StrictComparesAllocation) {
    TestDisk a(10 * block);
    TestDisk b(10 * block);
    empty(a);
    empty(b);
    for (const std::uint64_t at : {3, 4, 6}) must(b.write({at * block}, std::vector<std::byte>(block)));
    EXPECT_TRUE(must(compare_disks(a, b)).identical);
    const auto strict = must(compare_disks(a, b, {.strict = true}));
    EXPECT_FALSE(strict.identical);
    EXPECT_EQ(strict.first, allocation(3 * block, strict.first->bytes.length));
    b.bytes()[5 * block - 1] = std::byte{1};
    EXPECT_THAT(compare_all(a, b, {.strict = true}).differences,
                testing::UnorderedElementsAre(allocation(3 * block, 2 * block), contents(5 * block - 1, 1),
                                              allocation(6 * block, block)));
}

TEST(Compare, HolesAreNotRead) {
    Pair disks;
    empty(disks.a);
    empty(disks.b);
    disks.a.reads = disks.b.reads = 0;
    EXPECT_TRUE(must(compare_disks(disks.a, disks.b)).identical);
    EXPECT_LE(disks.a.reads + disks.b.reads, 2U);  // of no bytes
}

TEST(Compare, DamageIsAnErrorUnlessTheDifferenceComesFirst) {
    for (const unsigned workers : {1U, 4U}) {
        Pair disks;
        const CompareOptions options{.workers = workers};
        disks.b.bad_sector = 9 * block;
        EXPECT_TRUE(fails(compare_disks(disks.a, disks.b, options), Errc::io));
        disks.change(50 * block);
        EXPECT_TRUE(fails(compare_disks(disks.a, disks.b, options), Errc::io));
        disks.change(9 * block - 1);  // in the same piece
        EXPECT_EQ(must(compare_disks(disks.a, disks.b, options)).first->bytes.start.value, 9 * block - 1);
        auto all = options;
        all.visit = [](const Difference&) { return Result<void>(); };
        auto step = CompareStep::opening;
        all.failed_in = &step;
        EXPECT_TRUE(fails(compare_disks(disks.a, disks.b, all), Errc::io));
        EXPECT_EQ(step, CompareStep::reading);
    }
}

TEST(Compare, AnErrorOfTheVisitorEndsIt) {
    Pair disks;
    for (std::uint64_t at = 0; at < 64 * block; at += block) disks.change(at);
    unsigned visits = 0;
    const CompareOptions options{.visit = [&](const Difference&) -> Result<void> {
        ++visits;
        return std::unexpected(Error{Errc::no_space, "output", "is full"});
    }};
    EXPECT_TRUE(fails(compare_disks(disks.a, disks.b, options), Errc::no_space, {"is full"}));
    EXPECT_EQ(visits, 1U);
}

TEST(Compare, TellsItsProgressAndIsCancelled) {
    Pair disks(256 * block);
    for (std::uint64_t at = 0; at < 16 * block; at += block) {
        disks.a.punch(at);
        disks.b.punch(at);
    }
    for (const bool stops : {false, true}) {
        std::stop_source stop;
        // With one thread it is certain how far the others are.
        CompareOptions options{.workers = stops ? 1U : 2U};
        options.control.stop = stop.get_token();
        std::uint64_t last = 0;
        options.control.progress = [&](std::uint64_t done, std::uint64_t total) {
            EXPECT_GT(done, last);
            EXPECT_EQ(total, 256 * block);
            last = done;
            if (stops && done > 16 * block) stop.request_stop();
        };
        const auto result = compare_disks(disks.a, disks.b, options);
        if (stops) {
            EXPECT_TRUE(fails(result, Errc::cancelled));
            EXPECT_LT(last, 128 * block);
        } else {
            EXPECT_TRUE(must(result).identical);
            EXPECT_EQ(last, 256 * block);
        }
    }
}

// ---- Images ----

/// An image whose reads are counted.
class CountingDisk final : public Disk {
public:
    explicit CountingDisk(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}
    [[nodiscard]] std::uint64_t size() const override { return disk_->size(); }
    [[nodiscard]] std::uint64_t block_size() const override { return disk_->block_size(); }

    std::atomic<std::uint64_t> bytes_read = 0;

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        bytes_read += to.size();
        return disk_->read(at, to);
    }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override { return disk_->extent(at, limit); }

private:
    std::shared_ptr<Disk> disk_;
};

class CompareImages : public testing::Test {
protected:
    [[nodiscard]] std::string path(const std::string& name) const { return directory_ / name; }
    [[nodiscard]] ImageSpec image(const std::string& name) const { return {.location = {.path = path(name)}}; }

    /// Makes the image, of 4 MiB, and writes 64 KiB at each place.
    void make(const std::string& name, const std::vector<std::uint64_t>& places, const std::string& base = {},
              Preallocation preallocation = Preallocation::off) const {
        must(create({.image = {.path = path(name),
                               .options = {.size = 4 * MiB,
                                           .preallocation = preallocation,
                                           .backing_name = base,
                                           .backing_format = base.empty() ? "" : "qcow2"}}}));
        auto spec = image(name);
        spec.write.emplace();
        const auto opened = must(open_image(spec));
        for (const auto at : places) must(opened->write({at}, std::vector<std::byte>(64 * KiB, std::byte(7))));
        must(opened->close());
    }

    TemporaryDirectory directory_;
};

TEST_F(CompareImages, WhatTheyShareIsNotRead) {
    make("base", {0, MiB, 2 * MiB});
    make("one", {2 * MiB}, "base");
    make("two", {}, "base");
    CountingDisk one(must(open_image(image("one"))));
    CountingDisk two(must(open_image(image("two"))));
    EXPECT_TRUE(must(compare_disks(one, two)).identical);
    EXPECT_EQ(one.bytes_read, 64 * KiB);
    EXPECT_EQ(two.bytes_read, 64 * KiB);
}

TEST_F(CompareImages, WhatTheyShareBehindTheEndOfAFileIsDamage) {
    make("base", {0, MiB});
    make("one", {}, "base");
    make("two", {}, "base");
    std::filesystem::resize_file(path("base"), std::filesystem::file_size(path("base")) - 128 * KiB);
    CompareStep step = CompareStep::opening;
    EXPECT_TRUE(fails(compare(image("one"), image("two"), {.failed_in = &step}), Errc::corrupt, {"base"}));
    EXPECT_NE(step, CompareStep::opening);
}

TEST_F(CompareImages, PreallocatedHolesAreNotRead) {
    make("sparse", {MiB});
    make("mapped", {MiB}, "", Preallocation::metadata);
    CountingDisk mapped(must(open_image(image("mapped"))));
    EXPECT_TRUE(must(compare_disks(*must(open_image(image("sparse"))), mapped)).identical);
    EXPECT_LE(mapped.bytes_read, 128 * KiB);
}

TEST_F(CompareImages, JobsTellWhereTheyFail) {
    make("one", {0});
    write_file(path("two"), std::string(1000, 'x'));
    const auto found = must(compare(image("one"), image("two")));
    EXPECT_EQ(found.format_a, Format::qcow2);
    EXPECT_EQ(found.format_b, Format::raw);
    EXPECT_EQ(found.comparison.first->bytes.start.value, 0U);
    CompareStep step = CompareStep::reading;
    EXPECT_TRUE(fails(compare(image("one"), image("absent"), {.failed_in = &step}), Errc::not_found, {"absent"}));
    EXPECT_EQ(step, CompareStep::opening);
}

}  // namespace
}  // namespace qcow
