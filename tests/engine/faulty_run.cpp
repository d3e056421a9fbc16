#include "engine/faulty_run.h"

namespace qcow::test {

FaultyRun::FaultyRun(const Setting& setting)
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

Faults& FaultyRun::faults_for(Faults::Operation operation) {
    return operation == Faults::Operation::flush ? *flush_faults : *faults;
}

FaultyRun& FaultyRun::open() {
    note([&]() -> Result<void> {
        auto image = setting_.open(faulty_, true);
        if (!image) return std::unexpected(image.error());
        image_ = *std::move(image);
        guest_ =
            std::make_unique<Guest>(*image_, model_, [this] { return log_.mark(); }, setting_.discards_read_as_zeros);
        return {};
    });
    return *this;
}

void FaultyRun::work(const Mix& mix, unsigned steps, unsigned threads) {
    if (!guest_) return;
    Random random(run_seed());
    std::vector<Worker> workers;
    for (unsigned t = 0; t < threads; ++t) workers.emplace_back(*guest_, mix, Random(random.below(~std::uint64_t{0})));
    in_threads(threads, [&](unsigned t) {
        for (unsigned i = 0; i < steps; ++i) note([&] { return workers[t].step(); });
    });
}

void FaultyRun::perform(const Work& work, Random& random) {
    if (!guest_) return;
    test::perform(work, *guest_, random, [this](const auto& call) { note(call); });
    // After a flush that failed, what is read is not what the disk has.
    if (!work.compact || flush_faults->hits() != 0) return;
    close();
    if (flush_faults->hits() != 0) return;
    note([&] { return compact(faulty_, work); });
}

void FaultyRun::close() {
    if (!guest_) return;
    note([&] { return guest_->close(); });
    guest_.reset();
    image_.reset();
}

std::optional<std::string> FaultyRun::verdict(Random& random) {
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

std::uint64_t FaultyRun::leaks() const {
    const auto image = value_of(setting_.open(files_, false));
    const auto report = image->check({.workers = 1});
    return report ? report->leaks : 0;
}

std::uint64_t fail_each(const FaultyRun::Setting& setting, Faults::Operation operation,
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

std::uint64_t fill_at_each(FaultyRun::Setting setting, const std::function<void(FaultyRun&)>& work, std::uint64_t most,
                           Random& random) {
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
