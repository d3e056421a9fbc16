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

    explicit FaultyRun(const Setting& setting);

    [[nodiscard]] Faults& faults_for(Faults::Operation operation);

    /// Opens the image for writing. Where that fails, nothing of what follows is done.
    FaultyRun& open();

    /// Goes on after errors, as guests do.
    void work(const Mix& mix, unsigned steps, unsigned threads = 1);

    void perform(const Work& work, Random& random);

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

    void close();

    /// What is wrong with the files as they are, and as a power loss may leave them.
    std::optional<std::string> verdict(Random& random);

    /// The clusters that leak, when everything is closed.
    [[nodiscard]] std::uint64_t leaks() const;

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
std::uint64_t fail_each(const FaultyRun::Setting& setting, Faults::Operation operation,
                        const std::function<void(FaultyRun&)>& work, std::uint64_t most, Random& random);

/// Does the same work again and again, opening and closing included, and lets the file system be full after each number
/// of blocks in turn, or after `most` of them at random: half of the time for good, and half until the work is half
/// done. Only what needs room may fail, and in the end nothing leaks. Returns how often that was; what is wrong is an
/// exception.
std::uint64_t fill_at_each(FaultyRun::Setting setting, const std::function<void(FaultyRun&)>& work, std::uint64_t most,
                           Random& random);

}  // namespace qcow::test
