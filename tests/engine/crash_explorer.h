#pragma once
// Power losses, by the hundred: every state that they may leave is opened, checked, compared and written on.

#include <fmt/format.h>

#include <cstring>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/crash_states.h"
#include "engine/kept.h"
#include "engine/workload.h"
#include "support/guest.h"
#include "support/model.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/temporary_directory.h"

namespace qcow::test {

/// Opens the image among the files.
using Opener = std::function<Result<std::shared_ptr<Image>>(const Files&, bool writable)>;

/// What was done to the files and to the disk in them. Ticks of the model are indices into the log.
struct History {
    const StorageLog& log;
    const Files& before;
    const SectorModel& model;
    Kept kept = {};
    bool may_be_dirty = false;  ///< refcounts may be due to be counted anew
    Mix afterwards = {.write = 6, .discard = 2, .flush = 1, .longest = 40};  ///< what the guest does who comes back
    bool discards_read_as_zeros = true;
};

struct CrashOptions {
    unsigned samples = 200;             ///< random ones, besides all the nasty ones
    std::optional<unsigned> most = {};  ///< of the nasty ones, chosen at random
    unsigned qemu_checks = 0;
    unsigned return_every = 50;  ///< after how many states there is a second power loss; 0: never
};

struct CrashReport {
    unsigned states = 0;
    unsigned again = 0;  ///< of those, after a second power loss: while the guest of another state was at work
    unsigned qemu_checks = 0;
    std::optional<std::string> violation;  ///< the first one; nothing further was tried
};

class CrashExplorer {
public:
    CrashExplorer(const History& history, Opener open, Random& random)
        : history_(history), open_(std::move(open)), random_(random) {}

    CrashReport explore(const CrashOptions& options);

    /// What is wrong with the files as they are when everything is over, without a power loss.
    std::optional<std::string> judge_now(const Files& files);

private:
    /// One state: a moment, and what of the pending events arrived.
    struct Case {
        enum class Kind : std::uint8_t {
            none,
            all,
            only,
            without,
            subset,
            mask,
            torn,
            only_sector,
            without_sector,
            up_to_sector
        };
        std::size_t now = 0;
        Kind kind = Kind::none;
        std::uint64_t which = 0;  // an index, a mask or a seed
        std::uint64_t sector = 0;

        [[nodiscard]] std::string text() const {
            static constexpr const char* names[] = {"nothing pending arrived",
                                                    "all that was pending arrived",
                                                    "only pending event {} arrived",
                                                    "all arrived but pending event {}",
                                                    "a random half (seed {}) arrived",
                                                    "the pending events of mask {:#x} arrived",
                                                    "sectors at random (seed {}) arrived",
                                                    "of pending event {} only sector {} arrived, and nothing else",
                                                    "all arrived but of pending event {} sector {}",
                                                    "all arrived but of pending event {} what follows sector {}"};
            return fmt::format(fmt::runtime(names[static_cast<std::size_t>(kind)]), which, sector);
        }
    };

    /// Whether each sector of what was written repeats 16 bytes, as the guests of these tests do, and no metadata does.
    static bool is_guest_data(const StorageEvent& event);

    /// Where most is pending: every subset if that is little; else each event alone, each one missing; and metadata
    /// torn at each of their sectors, or at some of very many.
    void add_nasty(std::size_t now, const std::vector<CrashStates::Pending>& pending, std::vector<Case>& plan);

    /// The nasty ones, and random ones at random moments.
    std::vector<Case> make_plan(const CrashOptions& options);

    static Files build(const CrashStates& states, const Case& c);

    /// What is wrong with this state.
    std::optional<std::string> judge(const Files& crashed);

    /// Checks, unless the refcounts are due to be counted anew.
    static std::optional<std::string> corruption(Image& image, const Files& files, bool may_be_dirty,
                                                 std::uint64_t& leaks);

    /// Holds every sector against the model.
    std::optional<std::string> compare(Image& image, const Files& crashed);

    /// Where all that the disk stores is stored.
    static std::set<std::string> places_of(Image& image, const Files& files);

    /// Where a sector is stored: file and offset.
    static std::optional<std::string> place_of(Image& image, const Files& files, std::uint64_t sector);

    /// A guest that comes back after the power loss, and what is known of its disk then.
    struct Return {
        explicit Return(std::uint64_t sectors) : model(sectors) {}

        StorageLog log;
        SectorModel model;
    };

    /// It works, flushes, closes.
    std::optional<std::string> go_on(const Files& files, Return& back) const;

    /// Nothing is wrong with what it leaves, and no more leaks than before.
    std::optional<std::string> ended_well(const Files& files, const Return& back, std::uint64_t leaks);

    /// Power losses while the guest is at work that came back after this one.
    CrashReport explore_return(const Files& crashed);

    std::optional<std::string> qemu_finds(const Files& crashed, unsigned& checks);

    History history_;
    Opener open_;
    Random& random_;
    std::function<Files()> durable_;
    std::vector<Value> found_;  // what the last state held
    Tick settled_ = 0;
    Tick now_ = 0;
};

}  // namespace qcow::test
