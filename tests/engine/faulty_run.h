#pragma once
// Work on files of which operations fail.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/crash_explorer.h"
#include "engine/workload.h"
#include "support/faulty.h"

namespace qcow::test {

/// One run of always the same work.
class FaultyRun {
public:
    FaultyRun(Opener open, const Files& files, std::uint64_t size, bool discards_read_as_zeros)
        : open_(std::move(open)), files_(copy_of(files)), before_(copy_of(files)), model_(size / sector_bytes) {
        for (const auto& [name, storage] : files_) {
            // A flush fails below the log, which then knows what may be lost; everything else never gets that far.
            const auto flushes = std::make_shared<FaultyStorage>(storage, flush_faults);
            const auto recorded = std::make_shared<RecordingStorage>(flushes, name, log_);
            faulty_[name] = std::make_shared<FaultyStorage>(recorded, faults);
        }
        image_ = value_of(open_(faulty_, true));
        guest_ = std::make_unique<Guest>(*image_, model_, [this] { return log_.mark(); }, discards_read_as_zeros);
        guest_->adopt();
    }

    [[nodiscard]] Faults& faults_for(Faults::Operation operation) {
        return operation == Faults::Operation::flush ? *flush_faults : *faults;
    }

    /// Goes on after errors, as guests do.
    void work(const Mix& mix, unsigned steps, unsigned threads = 1) {
        Random random(run_seed());
        std::vector<Worker> workers;
        for (unsigned t = 0; t < threads; ++t)
            workers.emplace_back(*guest_, mix, Random(random.below(~std::uint64_t{0})));
        in_threads(threads, [&](unsigned t) {
            for (unsigned i = 0; i < steps; ++i) note(workers[t].step());
        });
    }

    void close() {
        note(guest_->close());
        guest_.reset();
        image_.reset();
    }

    /// What is wrong with the files as they are, and as a power loss may leave them.
    std::optional<std::string> verdict(Random& random) {
        CrashExplorer explorer({log_, before_, model_}, open_, random);
        if (auto wrong = explorer.judge_now(files_)) return wrong;
        return explorer.explore({.states = 6}).violation;
    }

    [[nodiscard]] const std::vector<Error>& errors() const { return errors_; }
    [[nodiscard]] Guest& guest() { return *guest_; }

    std::shared_ptr<Faults> faults = std::make_shared<Faults>();
    std::shared_ptr<Faults> flush_faults = std::make_shared<Faults>();

private:
    void note(const Result<void>& result) {
        if (result) return;
        const std::lock_guard lock(errors_mutex_);
        errors_.push_back(result.error());
    }

    Opener open_;
    Files files_;
    Files before_;
    Files faulty_;
    StorageLog log_;
    SectorModel model_;
    std::shared_ptr<Image> image_;
    std::unique_ptr<Guest> guest_;
    std::mutex errors_mutex_;
    std::vector<Error> errors_;
};

/// Does the same work again and again, and lets each operation of that kind fail in turn, or `most` of them at random.
/// Returns how many; what is wrong is an exception.
inline std::uint64_t fail_each(const std::function<std::unique_ptr<FaultyRun>()>& begin, Faults::Operation operation,
                               const Mix& mix, unsigned steps, std::uint64_t most, Random& random) {
    const auto dry = begin();
    dry->faults_for(operation).arm({operation, ~std::uint64_t{0}});
    dry->work(mix, steps);
    dry->close();
    if (!dry->errors().empty()) throw std::runtime_error("without a fault: " + dry->errors().front().message());
    const auto operations = dry->faults_for(operation).count(operation);
    const auto wanted = std::min(operations, most);
    for (std::uint64_t i = 0; i < wanted; ++i) {
        Faults::Fault fault{operation};
        fault.after = wanted == operations ? i : random.below(operations);
        fault.times = random.pick({1, 1, 3, 1'000'000});
        fault.code = operation == Faults::Operation::read ? Errc::io : random.pick({Errc::io, Errc::no_space});
        fault.percent_done = random.pick({0U, 40U, 100U});
        try {
            const auto run = begin();
            run->faults_for(operation).arm(fault);
            run->work(mix, steps);
            run->close();
            const auto hits = run->faults_for(operation).hits();
            run->faults_for(operation).disarm();
            if (hits == 0 && !run->errors().empty()) throw std::runtime_error("an error without a fault");
            // Space that cannot be given back is nobody's error, and where there is none there may be some elsewhere.
            const bool avoidable = operation == Faults::Operation::space || fault.code == Errc::no_space;
            if (hits != 0 && run->errors().empty() && !avoidable) throw std::runtime_error("nobody was told");
            if (!run->errors().empty() && run->errors().front().code != fault.code)
                throw std::runtime_error("another error: " + run->errors().front().message());
            if (const auto wrong = run->verdict(random)) throw std::runtime_error(*wrong);
        } catch (const std::exception& e) {
            throw std::runtime_error(fmt::format("operation {} of {} fails, {} times, code {}, {}% done: {}",
                                                 fault.after, operations, fault.times, static_cast<int>(fault.code),
                                                 fault.percent_done, e.what()));
        }
    }
    return wanted;
}

}  // namespace qcow::test
