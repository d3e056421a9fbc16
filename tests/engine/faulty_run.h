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
            faulty_[name] = std::make_shared<FaultyStorage>(recorded, faults);
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

    [[nodiscard]] std::uint64_t hits() const { return faults->hits() + flush_faults->hits(); }
    [[nodiscard]] const std::vector<Error>& errors() const { return errors_; }
    [[nodiscard]] Guest& guest() { return *guest_; }

    /// Of one thread: the calls that met a fault and succeeded, and those that failed first, without having met any.
    [[nodiscard]] std::uint64_t silent() const { return silent_; }
    [[nodiscard]] std::uint64_t late() const { return late_; }

    std::shared_ptr<Faults> faults = std::make_shared<Faults>();
    std::shared_ptr<Faults> flush_faults = std::make_shared<Faults>();

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

}  // namespace qcow::test
