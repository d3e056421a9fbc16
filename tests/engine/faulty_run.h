#pragma once
// Work on files of which operations fail.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/crash_explorer.h"
#include "engine/works.h"
#include "support/faulty.h"

namespace qcow::test {

/// One run of always the same work.
class FaultyRun {
public:
    /// What is worked on, and how it is opened; see History.
    struct Setting {
        Opener open;
        Files files;
        std::uint64_t sectors = 0;
        std::uint64_t sectors_most = 0;  ///< resized to
        bool discards_read_as_zeros = true;
        bool dirty = false;
        Kept kept = {};
        SparseStorage::Zeros zeros = SparseStorage::Zeros::blocks;  ///< what there is room for at first
    };

    explicit FaultyRun(const Setting& setting)
        : setting_(setting),
          files_(copy_of(setting.files)),
          before_(copy_of(setting.files)),
          model_(setting.sectors, setting.sectors_most) {
        for (const auto& [name, storage] : files_) {
            // A flush fails below the log, which then knows what may be lost; everything else never gets that far.
            const auto flushes = std::make_shared<FaultyStorage>(storage, flush_faults);
            const auto recorded = std::make_shared<RecordingStorage>(flushes, name, log_);
            const auto sparse = std::make_shared<SparseStorage>(recorded, room, setting.zeros);
            faulty_[name] = std::make_shared<FaultyStorage>(sparse, faults);
        }
        adopt(*value_of(setting_.open(files_, false)), model_);
    }

    [[nodiscard]] Faults& faults_for(Faults::Operation operation) {
        return operation == Faults::Operation::flush ? *flush_faults : *faults;
    }

    /// Opens the image for writing. Where that fails, nothing of what follows is done.
    FaultyRun& open() {
        note([&]() -> Result<void> {
            auto image = setting_.open(faulty_, true);
            if (!image) return std::unexpected(image.error());
            image_ = *std::move(image);
            guest_ = std::make_unique<Guest>(
                *image_, model_, [this] { return log_.mark(); }, setting_.discards_read_as_zeros);
            return {};
        });
        return *this;
    }

    /// Goes on after errors, as guests do.
    void work(const Mix& mix, unsigned steps, unsigned threads = 1) {
        if (!guest_) return;
        Random random(run_seed());
        std::vector<Worker> workers;
        for (unsigned t = 0; t < threads; ++t)
            workers.emplace_back(*guest_, mix, Random(random.below(~std::uint64_t{0})));
        in_threads(threads, [&](unsigned t) {
            for (unsigned i = 0; i < steps; ++i) note([&] { return workers[t].step(); });
        });
    }

    void perform(const Work& work, Random& random) {
        if (guest_) test::perform(work, *guest_, random, [this](const auto& call) { note(call); });
    }

    /// Notes what a call returns, and whether it was told of the faults that it met.
    template <class Call>
    void note(const Call& call) {
        const auto before = hits();
        const Result<void> result = call();
        const auto met = hits() - before;
        const std::lock_guard lock(errors_mutex_);
        if (result) {
            if (met != 0) ++silent_;
            return;
        }
        if (met == 0 && errors_.empty()) ++late_;
        errors_.push_back(result.error());
    }

    void close() {
        if (!guest_) return;
        note([&] { return guest_->close(); });
        guest_.reset();
        image_.reset();
    }

    /// What is wrong with the files as they are, and as a power loss may leave them.
    std::optional<std::string> verdict(Random& random) {
        CrashExplorer explorer({.log = log_,
                                .before = before_,
                                .model = model_,
                                .kept = setting_.kept,
                                .may_be_dirty = setting_.dirty,
                                .discards_read_as_zeros = setting_.discards_read_as_zeros},
                               setting_.open, random);
        if (auto wrong = explorer.judge_now(files_)) return wrong;
        return explorer.explore({.samples = 2, .most = 4, .return_every = 0}).violation;
    }

    /// The clusters that leak, when everything is closed.
    [[nodiscard]] std::uint64_t leaks() const {
        const auto image = value_of(setting_.open(files_, false));
        const auto report = image->check({.workers = 1});
        return report ? report->leaks : 0;
    }

    [[nodiscard]] std::uint64_t hits() const { return faults->hits() + flush_faults->hits(); }
    [[nodiscard]] const std::vector<Error>& errors() const { return errors_; }
    [[nodiscard]] bool is_open() const { return guest_ != nullptr; }
    [[nodiscard]] Guest& guest() { return *guest_; }

    /// Of one thread: the calls that met a fault and succeeded, and those that failed first, without having met any.
    [[nodiscard]] std::uint64_t silent() const { return silent_; }
    [[nodiscard]] std::uint64_t late() const { return late_; }

    std::shared_ptr<Faults> faults = std::make_shared<Faults>();
    std::shared_ptr<Faults> flush_faults = std::make_shared<Faults>();
    std::shared_ptr<FreeBlocks> room = std::make_shared<FreeBlocks>();

private:
    Setting setting_;
    Files files_;
    Files before_;
    Files faulty_;
    StorageLog log_;
    SectorModel model_;
    std::shared_ptr<Image> image_;
    std::unique_ptr<Guest> guest_;
    std::mutex errors_mutex_;
    std::vector<Error> errors_;
    std::uint64_t silent_ = 0;
    std::uint64_t late_ = 0;
};

/// Does the same work again and again, opening and closing included, and lets each operation of that kind fail in turn,
/// or `most` of them at random: once and for good, with each error. Returns how many faults that were; what is wrong is
/// an exception.
inline std::uint64_t fail_each(const FaultyRun::Setting& setting, Faults::Operation operation,
                               const std::function<void(FaultyRun&)>& work, std::uint64_t most, Random& random) {
    const auto perform = [&](FaultyRun& run) {
        run.open();
        work(run);
        run.close();
    };
    FaultyRun dry(setting);
    dry.faults_for(operation).arm({operation, ~std::uint64_t{0}});
    perform(dry);
    if (!dry.errors().empty()) throw std::runtime_error("without a fault: " + dry.errors().front().message());
    const auto operations = dry.faults_for(operation).count(operation);
    const auto wanted = std::min(operations, most);
    std::uint64_t done = 0;
    for (std::uint64_t i = 0; i < wanted; ++i) {
        Faults::Fault fault{operation};
        fault.after = wanted == operations ? i : random.below(operations);
        for (const auto times : {std::uint64_t{1}, std::uint64_t{1'000'000}}) {
            for (const auto code : {Errc::io, Errc::no_space}) {
                if (operation == Faults::Operation::read && code == Errc::no_space) continue;
                fault.times = times;
                fault.code = code;
                fault.percent_done = random.pick({0U, 40U, 100U});
                try {
                    FaultyRun run(setting);
                    run.faults_for(operation).arm(fault);
                    perform(run);
                    if (run.hits() == 0) throw std::runtime_error("the fault was never met");
                    run.faults_for(operation).disarm();
                    // Space that cannot be given back is nobody's error, and where there is none there may be some
                    // elsewhere.
                    const bool avoidable = operation == Faults::Operation::space || code == Errc::no_space;
                    if (run.silent() != 0 && !avoidable) throw std::runtime_error("a call met it and succeeded");
                    if (run.late() != 0) throw std::runtime_error("another call than the one that met it failed");
                    if (!run.errors().empty() && run.errors().front().code != code)
                        throw std::runtime_error("another error: " + run.errors().front().message());
                    if (const auto wrong = run.verdict(random)) throw std::runtime_error(*wrong);
                } catch (const std::exception& e) {
                    throw std::runtime_error(fmt::format("operation {} of {} fails, {} times, code {}, {}% done: {}",
                                                         fault.after, operations, fault.times, static_cast<int>(code),
                                                         fault.percent_done, e.what()));
                }
                ++done;
            }
        }
    }
    return done;
}

/// Does the same work again and again, opening and closing included, and lets the file system be full after each number
/// of blocks in turn, or after `most` of them at random: half of the time for good, and half until the work is half
/// done. Only what needs room may fail, and in the end nothing leaks. Returns how often that was; what is wrong is an
/// exception.
inline std::uint64_t fill_at_each(FaultyRun::Setting setting, const std::function<void(FaultyRun&)>& work,
                                  std::uint64_t most, Random& random) {
    const auto must_succeed = [](FaultyRun& run, const char* what, const auto& part) {
        const auto before = run.errors().size();
        part();
        if (run.errors().size() != before)
            throw std::runtime_error(fmt::format("{}: {}", what, run.errors().back().message()));
    };
    const auto perform = [&](FaultyRun& run, bool lifted) {
        run.open();
        if (!run.is_open()) {
            if (setting.dirty) return;  // all is counted anew, which may take room
            throw std::runtime_error("cannot be opened: " + run.errors().back().message());
        }
        work(run);
        if (lifted) {
            run.room->set(std::nullopt);
            must_succeed(run, "with room again", [&] { work(run); });
            const auto overwrite = [&] { run.note([&] { return run.guest().write(0, 1); }); };
            must_succeed(run, "with room again", overwrite);
            run.room->set(0);
            must_succeed(run, "in place", overwrite);
        }
        must_succeed(run, "a flush", [&] { run.note([&] { return run.guest().flush(); }); });
        if (run.guest().failed_flushes() != 0)
            throw std::runtime_error("a flush failed: " + run.errors().back().message());
        if (auto wrong = run.guest().verify(0, run.guest().sectors())) throw std::runtime_error(*wrong);
        must_succeed(run, "closing", [&] { run.close(); });
    };
    std::uint64_t done = 0;
    for (const auto zeros : {SparseStorage::Zeros::blocks, SparseStorage::Zeros::holes}) {
        setting.zeros = zeros;
        FaultyRun dry(setting);
        perform(dry, false);
        if (!dry.errors().empty()) throw std::runtime_error("with room: " + dry.errors().front().message());
        const auto blocks = dry.room->taken();
        const auto wanted = std::min(blocks, most);
        for (std::uint64_t i = 0; i < wanted; ++i) {
            const auto room = wanted == blocks ? i : random.below(blocks);
            const bool lifted = i % 2 == 0;
            try {
                FaultyRun run(setting);
                run.room->set(room);
                perform(run, lifted);
                if (run.room->refused() == 0) continue;  // what was freed sufficed
                ++done;
                for (const auto& error : run.errors())
                    if (error.code != Errc::no_space) throw std::runtime_error("another error: " + error.message());
                if (const auto wrong = run.verdict(random)) throw std::runtime_error(*wrong);
                if (run.leaks() != 0) throw std::runtime_error(fmt::format("{} clusters leak", run.leaks()));
            } catch (const std::exception& e) {
                throw std::runtime_error(fmt::format("room for {} of {} blocks{}{}: {}", room, blocks,
                                                     zeros == SparseStorage::Zeros::holes ? ", zeros are holes" : "",
                                                     lifted ? ", then as many as there are wanted" : "", e.what()));
            }
        }
    }
    return done;
}

}  // namespace qcow::test
