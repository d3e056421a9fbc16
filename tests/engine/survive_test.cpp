// The process that writes an image is killed, and what is complete survives in memory that another process has, too.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>

#include "engine/crash_states.h"
#include "engine/works.h"
#include "storage/redo_log.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

/// What survives the process: memory, and the files as they are before this event of their log.
struct KillMoment {
    Tick tick = 0;
    Bytes memory;
};

/// Notes moments at which the process may be killed. One thread works.
class KillMoments {
public:
    KillMoments(Random random, unsigned percent) : random_(std::move(random)), percent_(percent) {}

    void pass() {
        if (!over_ && random_.chance(percent_)) take();
    }

    void take() { moments_.push_back({log_.mark(), {memory().begin(), memory().end()}}); }

    /// There are no more.
    void end() { over_ = true; }

    /// What is in the memory in the beginning.
    void set_memory(const Bytes& bytes) { std::ranges::copy(bytes, memory().begin()); }

    [[nodiscard]] StorageLog& log() { return log_; }
    [[nodiscard]] std::span<std::byte> memory() { return std::as_writable_bytes(std::span(words_)); }
    [[nodiscard]] const std::vector<KillMoment>& moments() const { return moments_; }

private:
    StorageLog log_;
    std::vector<std::uint64_t> words_ = std::vector<std::uint64_t>(RedoLog::min_bytes / 8);
    std::vector<KillMoment> moments_;
    Random random_;
    unsigned percent_;
    bool over_ = false;
};

/// A file of a process that may be killed before each change of it.
class KilledStorage final : public PassThrough {
public:
    KilledStorage(std::shared_ptr<Storage> inner, KillMoments& moments)
        : PassThrough(std::move(inner)), moments_(moments) {}

    Result<void> write(HostOffset at, ConstBuffers from) override {
        moments_.pass();
        return PassThrough::write(at, from);
    }
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        moments_.pass();
        return PassThrough::write_zeroes(at, length);
    }
    Result<void> resize(std::uint64_t size) override {
        moments_.pass();
        return PassThrough::resize(size);
    }
    Result<void> flush() override {
        moments_.pass();
        return PassThrough::flush();
    }

private:
    KillMoments& moments_;
};

/// The files with every change noted.
Files killed_files(const Files& files, KillMoments& moments) {
    Files result;
    for (const auto& [name, storage] : files) {
        result[name] =
            std::make_shared<KilledStorage>(std::make_shared<RecordingStorage>(storage, name, moments.log()), moments);
    }
    return result;
}

std::optional<std::string> damage_of(Image& image) {
    const auto report = image.check({.workers = 1});
    if (!report) return "cannot be checked: " + report.error().message();
    if (report->corruptions + report->errors == 0) return std::nullopt;
    return "is corrupt: " + report->findings.front().place + ": " + report->findings.front().what;
}

/// Everything that was complete at this moment is there.
std::optional<std::string> judge_survivor(Image& image, const Files& files, const SectorModel& model, const Kept& kept,
                                          Tick now) {
    const auto sectors = image.size() / sector_bytes;
    if (!model.allows_size(sectors, now, now)) return fmt::format("has {} sectors", sectors);
    Bytes bytes(image.size());
    if (const auto read = image.read({0}, bytes); !read) return "cannot be read: " + read.error().message();
    for (std::uint64_t i = 0; i < sectors; ++i) {
        const auto value = value_in(i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
        if (!model.allows(i, value, now, now)) return model.complaint(i, value, now, now);
    }
    if (auto damage = damage_of(image)) return damage;
    return kept.harm(image, files, now);
}

/// The image can be written on.
std::optional<std::string> judge_later_work(Image& image) {
    const Bytes bytes(image.size(), std::byte{1});
    for (const auto& change : {image.discard({0}, image.size()), image.flush(), image.write({0}, bytes)})
        if (!change) return "cannot be written on: " + change.error().message();
    return damage_of(image);
}

class SurviveTest : public testing::TestWithParam<Work> {
protected:
    /// Opens the image, with the memory of the process that was killed, and judges what is there.
    std::optional<std::string> judge(const Files& files, KillMoments& moments, Tick now) {
        const auto image = open_kind(GetParam().kind, killed_files(files, moments), true);
        if (!image) return "cannot be opened: " + image.error().message();
        if (auto survived = (*image)->survive_in({moments.memory(), nullptr}); !survived) {
            // A process that opened the image has counted the references, and was killed before it took over.
            if (may_be_recounted_ && survived.error().code == Errc::invalid_argument) return std::nullopt;
            return "does not survive: " + survived.error().message();
        }
        if (auto wrong = judge_survivor(**image, files, *model_, kept_, now)) return wrong;
        moments.end();
        return judge_later_work(**image);
    }

    /// As a process finds it, which may be killed itself while it takes over.
    std::optional<std::string> judge_moments(KillMoments& moments, const Files& before, std::optional<Tick> when,
                                             unsigned again, Random& random) {
        CrashStates states(moments.log(), before);
        for (const auto& moment : moments.moments()) {
            states.advance(moment.tick);
            const auto files = states.build([](auto, auto) { return true; });
            const auto now = when.value_or(moment.tick);
            KillMoments next(Random(random.below(~std::uint64_t{0})), again);
            next.set_memory(moment.memory);
            const auto first = copy_of(files);
            const bool dirty = value_of(value_of(open_kind(GetParam().kind, first, false))->info()).dirty;
            auto wrong = judge(files, next, now);
            if (!wrong && again != 0) {
                may_be_recounted_ = dirty;
                wrong = judge_moments(next, first, now, 0, random);
                may_be_recounted_ = false;
            }
            ++judged_;
            if (wrong) return fmt::format("killed before event {}: {}", moment.tick, *wrong);
        }
        return std::nullopt;
    }

    std::unique_ptr<SectorModel> model_;
    Kept kept_;
    unsigned judged_ = 0;
    bool may_be_recounted_ = false;
};

std::vector<Work> works_of_a_killed_process() {
    auto all = works();
    std::erase_if(all, [](const Work& work) { return work.threads != 1 || work.full || work.compact; });
    // Few flushes, so that much is in the process alone.
    for (auto& work : all) work.mix.flush = std::min(work.mix.flush, 1U);
    return all;
}

TEST_P(SurviveTest, NothingCompleteIsLost) {
    const auto& work = GetParam();
    for (unsigned round = 0; round < effort(); ++round) {
        auto random = Random::named(fmt::format("survive {}/{}", work.name, round));
        auto prepared = prepare(work.kind, random);
        const auto before = copy_of(prepared.files);
        KillMoments moments(Random(random.below(~std::uint64_t{0})), sanitized ? 3 : 10);
        model_ = std::make_unique<SectorModel>(work.kind.create.size / sector_bytes, work.mix.resized_most);
        {
            const auto image = value_of(open_kind(work.kind, killed_files(prepared.files, moments), true));
            Guest guest(*image, *model_, [&] { return moments.log().mark(); }, work.kind.discards_read_as_zeros());
            guest.adopt();
            value_of(image->survive_in({moments.memory(), nullptr}));
            perform(work, guest, random, [&](const auto& call) {
                value_of(Result<void>(call()));
                moments.pass();
            });
            moments.take();
            kept_ = std::move(prepared.kept);
            kept_.made = guest.snapshots();
        }
        const auto wrong = judge_moments(moments, before, {}, sanitized ? 5 : 20, random);
        ASSERT_FALSE(wrong) << "round " << round << ": " << *wrong << "\n" << replay_hint();
    }
    std::cout << "covered " << judged_ << " kills\n";
    EXPECT_GT(judged_, 0U);
}

INSTANTIATE_TEST_SUITE_P(Work, SurviveTest, testing::ValuesIn(works_of_a_killed_process()),
                         [](const auto& test) { return test.param.name; });

/// An image of which `write` has written something that is not flushed, and the memory.
struct Survivor {
    std::shared_ptr<Storage> file = memory_storage();
    std::vector<std::uint64_t> words = std::vector<std::uint64_t>(RedoLog::min_bytes / 8);

    Survivor() {
        value_of(create_image({file, nullptr}, {.size = 1 << 20, .cluster_size = 4096}));
        auto image = open();
        value_of(image->survive_in(memory()));
        value_of(image->write({0}, Bytes(4096, std::byte{1})));
        // As they are now: the image flushes when it goes.
        const auto bytes = contents_of(*file);
        const auto left = words;
        image.reset();
        file = memory_storage(bytes, "disk.qcow2");
        words = left;
    }

    [[nodiscard]] SurvivingMemory memory() { return {std::as_writable_bytes(std::span(words)), nullptr}; }
    [[nodiscard]] std::shared_ptr<Image> open() const { return value_of(open_image(file, {.writable = true})); }
    [[nodiscard]] static std::byte first_byte(Image& image) {
        Bytes byte(1);
        value_of(image.read({0}, byte));
        return byte[0];
    }
};

TEST(SurviveMemoryTest, IsTakenOverOnce) {
    Survivor survivor;
    const auto image = survivor.open();
    EXPECT_EQ(Survivor::first_byte(*image), std::byte{0});
    value_of(image->survive_in(survivor.memory()));
    EXPECT_EQ(Survivor::first_byte(*image), std::byte{1});
    EXPECT_TRUE(RedoLog::read(survivor.memory().bytes).empty());
    value_of(image->survive_in(survivor.memory()));
    EXPECT_EQ(Survivor::first_byte(*image), std::byte{1});
}

/// What was complete before does not depend on the memory that there was then.
TEST(SurviveMemoryTest, MayBeAnotherOneLater) {
    Survivor survivor;
    auto image = survivor.open();
    value_of(image->survive_in(survivor.memory()));
    value_of(image->write({64 << 10}, Bytes(4096, std::byte{2})));
    Survivor other;
    other.words.assign(other.words.size(), 0);
    value_of(image->survive_in(other.memory()));
    const auto bytes = contents_of(*survivor.file);
    const auto left = other.words;
    image.reset();
    other.file = memory_storage(bytes, "disk.qcow2");
    other.words = left;
    image = other.open();
    value_of(image->survive_in(other.memory()));
    Bytes found(1);
    value_of(image->read({64 << 10}, found));
    EXPECT_EQ(found[0], std::byte{2});
    image.reset();
}

/// A front end comes and goes while others write.
TEST(SurviveMemoryTest, ChangesWhileOthersWrite) {
    constexpr unsigned writers = 4;
    constexpr std::uint64_t share = 256 << 10;
    std::array<std::vector<std::uint64_t>, 2> memories;
    for (auto& words : memories) words.resize(RedoLog::min_bytes / 8);
    const auto file = memory_storage();
    value_of(create_image({file, nullptr}, {.size = writers * share, .cluster_size = 4096}));
    const auto image = value_of(open_image(file, {.writable = true}));
    std::atomic<unsigned> working = writers;
    std::thread mover([&] {
        for (unsigned i = 0; working > 0; ++i)
            value_of(image->survive_in({std::as_writable_bytes(std::span(memories[i % 2])), nullptr}));
    });
    in_threads(writers, [&](unsigned writer) {
        for (unsigned i = 0; i < 300; ++i) {
            const GuestOffset at{writer * share + i % 64 * 4096};
            if (i % 7 == 0) {
                value_of(image->discard(at, 4096));
            } else {
                value_of(image->write(at, Bytes(4096, static_cast<std::byte>(i % 251))));
            }
            if (i % 50 == 0) value_of(image->flush());
        }
        --working;
    });
    mover.join();
    for (unsigned writer = 0; writer < writers; ++writer) {
        for (unsigned i = 300 - 64; i < 300; ++i) {
            Bytes found(1);
            value_of(image->read({writer * share + i % 64 * 4096}, found));
            EXPECT_EQ(found[0], i % 7 == 0 ? std::byte{0} : static_cast<std::byte>(i % 251)) << writer << " " << i;
        }
    }
    EXPECT_FALSE(damage_of(*image));
    value_of(image->close());
}

TEST(SurviveMemoryTest, IsRefusedOnceTheDiskWasWritten) {
    Survivor survivor;
    const auto image = survivor.open();
    value_of(image->write({64 << 10}, Bytes(4096, std::byte{2})));
    const auto survived = image->survive_in(survivor.memory());
    ASSERT_FALSE(survived);
    EXPECT_EQ(survived.error().code, Errc::invalid_argument);
    EXPECT_NE(survived.error().what.find("restart the guest"), std::string::npos);
    EXPECT_EQ(Survivor::first_byte(*image), std::byte{0});
}

TEST(SurviveMemoryTest, IsRefusedWhereSomebodyElseHasWritten) {
    Survivor survivor;
    {
        const auto other = survivor.open();
        value_of(other->write({0}, Bytes(4096, std::byte{3})));
    }
    const auto image = survivor.open();
    const auto survived = image->survive_in(survivor.memory());
    ASSERT_FALSE(survived);
    EXPECT_EQ(survived.error().code, Errc::invalid_argument);
    EXPECT_EQ(Survivor::first_byte(*image), std::byte{3});
    EXPECT_FALSE(image->info().value().dirty);
}

/// Somebody who repairs leaks gives away what only the memory refers to.
TEST(SurviveMemoryTest, IsRefusedWhereLeaksWereRepaired) {
    Survivor survivor;
    const TemporaryDirectory directory;
    const auto path = directory / image_name;
    save({{image_name, survivor.file}}, directory.path());
    must_qemu_img({"check", "-q", "-r", "leaks", path});
    survivor.file = load(path, image_name);
    const auto image = survivor.open();
    EXPECT_EQ(image->survive_in(survivor.memory()).error().code, Errc::invalid_argument);
    EXPECT_EQ(Survivor::first_byte(*image), std::byte{0});
}

TEST(SurviveMemoryTest, TooLittleIsRefused) {
    Survivor survivor;
    auto memory = survivor.memory();
    memory.bytes = memory.bytes.first(RedoLog::min_bytes - 8);
    EXPECT_EQ(survivor.open()->survive_in(memory).error().code, Errc::invalid_argument);
}

/// Whatever is in the memory, the image stays one that can be opened, or is refused with an error.
TEST(SurviveMemoryTest, IsNotTrusted) {
    auto random = Random::named("hostile surviving memory");
    for (unsigned i = 0; i < 200 * effort(); ++i) {
        Survivor survivor;
        for (int changes = 0; changes < 3; ++changes)
            survivor.words[random.below(20)] =
                random.chance(50) ? random.below(1 << 20) * 512 : random.below(~std::uint64_t{0});
        const auto image = survivor.open();
        if (!image->survive_in(survivor.memory())) continue;
        static_cast<void>(image->write({0}, Bytes(64 << 10, std::byte{2})));
        static_cast<void>(image->flush());
        const auto report = image->check({});
        ASSERT_TRUE(!report || report->corruptions == 0) << replay_hint();
    }
}

}  // namespace
}  // namespace qcow::test
