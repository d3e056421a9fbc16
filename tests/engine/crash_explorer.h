#pragma once
// Power losses, by the hundred: every state that they may leave is opened, checked, compared and written on.

#include <fmt/format.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/crash_states.h"
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
    std::size_t begin = 1;  ///< the image exists from here on
};

struct CrashOptions {
    unsigned states = 250;     ///< at most
    unsigned qemu_checks = 0;  ///< of those
};

struct CrashReport {
    unsigned states = 0;
    unsigned qemu_checks = 0;
    std::optional<std::string> violation;  ///< the first one; nothing further was tried
};

class CrashExplorer {
public:
    CrashExplorer(const History& history, Opener open, Random& random)
        : history_(history), open_(std::move(open)), random_(random) {}

    CrashReport explore(const CrashOptions& options) {
        CrashReport report;
        const auto plan = make_plan(options.states);
        const auto every = options.qemu_checks == 0 ? 0 : std::max<std::size_t>(1, plan.size() / options.qemu_checks);
        CrashStates states(history_.log, history_.before);
        for (std::size_t i = 0; i < plan.size() && !report.violation; ++i) {
            states.advance(plan[i].now);
            settled_ = history_.model.settled_at(plan[i].now);
            now_ = plan[i].now;
            const auto crashed = build(states, plan[i]);
            durable_ = [&] { return build(states, {plan[i].now, Case::Kind::none}); };
            report.violation = judge(crashed);
            ++report.states;
            if (!report.violation && every != 0 && i % every == 0) {
                report.violation = qemu_finds(crashed);
                ++report.qemu_checks;
            }
            if (report.violation)
                *report.violation = fmt::format("power loss before event {} of {}, {}: {}", plan[i].now,
                                                history_.log.events().size(), plan[i].text(), *report.violation);
        }
        return report;
    }

    /// What is wrong with the files as they are when everything is over, without a power loss.
    std::optional<std::string> judge_now(const Files& files) {
        now_ = history_.log.events().size();
        settled_ = history_.model.settled_at(now_);
        durable_ = [&] { return files; };
        return judge(files);
    }

private:
    /// One state: a moment, and what of the pending events arrived.
    struct Case {
        enum class Kind : std::uint8_t { none, all, only, without, subset, mask, torn };
        std::size_t now = 0;
        Kind kind = Kind::none;
        std::uint64_t which = 0;  // an index, a mask or a seed

        [[nodiscard]] std::string text() const {
            static constexpr const char* names[] = {"nothing pending arrived",
                                                    "all that was pending arrived",
                                                    "only pending event {} arrived",
                                                    "all arrived but pending event {}",
                                                    "a random half (seed {}) arrived",
                                                    "the pending events of mask {:#x} arrived",
                                                    "sectors at random (seed {}) arrived"};
            return fmt::format(fmt::runtime(names[static_cast<std::size_t>(kind)]), which);
        }
    };

    /// Where little is pending every subset, else the nasty ones; then random ones until there are enough.
    std::vector<Case> make_plan(unsigned wanted) {
        using Kind = Case::Kind;
        const auto& events = history_.log.events();
        std::vector<Case> nasty;
        std::vector<std::size_t> moments;
        CrashStates states(history_.log, history_.before);
        for (std::size_t now = history_.begin; now <= events.size(); ++now) {
            const bool last = now == events.size();
            if (!last && events[now].kind == StorageEvent::Kind::mark) continue;
            moments.push_back(now);
            // Most is pending where a flush is about to end.
            if (!last && events[now].kind != StorageEvent::Kind::flush_end) continue;
            states.advance(now);
            const auto pending = states.pending().size();
            if (pending <= 4) {
                for (std::uint64_t mask = 0; mask < 1U << pending; ++mask) nasty.push_back({now, Kind::mask, mask});
                continue;
            }
            nasty.push_back({now, Kind::none});
            nasty.push_back({now, Kind::all});
            for (std::size_t i = 0; i < pending; ++i) {
                nasty.push_back({now, Kind::only, i});
                nasty.push_back({now, Kind::without, i});
            }
        }
        const auto shuffle = [&](std::vector<Case>& cases) {
            for (std::size_t i = cases.size(); i > 1; --i) std::swap(cases[i - 1], cases[random_.below(i)]);
        };
        shuffle(nasty);
        nasty.resize(std::min<std::size_t>(nasty.size(), wanted * 2 / 3));
        while (nasty.size() < wanted && !moments.empty()) {
            const auto kind = random_.chance(50) ? Kind::subset : Kind::torn;
            nasty.push_back({random_.pick(moments), kind, random_.below(1'000'000'000)});
        }
        std::ranges::stable_sort(nasty, {}, &Case::now);
        return nasty;
    }

    static Files build(const CrashStates& states, const Case& c) {
        const auto pending = states.pending();
        const auto index = [&](std::size_t event) {
            return static_cast<std::uint64_t>(std::ranges::lower_bound(pending, event) - pending.begin());
        };
        Random random(c.which);
        std::set<std::size_t> half;
        for (const auto event : pending) {
            if (random.chance(50)) half.insert(event);
        }
        return states.build([&](std::size_t event) {
            switch (c.kind) {
                case Case::Kind::none: return false;
                case Case::Kind::all: return true;
                case Case::Kind::only: return index(event) == c.which;
                case Case::Kind::without: return index(event) != c.which;
                case Case::Kind::mask: return (c.which >> index(event) & 1) != 0;
                case Case::Kind::subset: return half.contains(event);
                case Case::Kind::torn: return random.chance(50);
            }
            return false;
        });
    }

    /// What is wrong with this state.
    std::optional<std::string> judge(const Files& crashed) {
        const auto read_only = open_(crashed, false);
        if (!read_only) return "cannot be opened: " + read_only.error().message();
        if (auto corrupt = corruption(**read_only, crashed)) return corrupt;
        std::vector<Value> found;
        if (auto wrong = compare(**read_only, crashed, found)) return wrong;
        return go_on(copy_of(crashed), found);
    }

    /// Checks, unless lazy refcounts are due to be rebuilt.
    static std::optional<std::string> corruption(Image& image, const Files& files) {
        const auto info = image.info();
        if (!info) return "has no info: " + info.error().message();
        if (info->dirty) return std::nullopt;
        const auto report = image.check({.workers = 1});
        if (!report) {
            if (report.error().code == Errc::unsupported && image.format() == Format::raw) return std::nullopt;
            return "cannot be checked: " + report.error().message();
        }
        if (report->corruptions + report->errors == 0) return std::nullopt;
        std::string text = fmt::format("corrupt ({} bytes)", value_of(files.at(image_name)->size()));
        for (const auto& finding : report->findings) {
            if (finding.severity != CheckFinding::Severity::leak && text.size() < 500)
                text += "; " + finding.place + ": " + finding.what;
        }
        return text;
    }

    /// Holds every sector against the model.
    std::optional<std::string> compare(Image& image, const Files& crashed, std::vector<Value>& found) {
        const auto sectors = image.size() / sector_bytes;
        if (!history_.model.allows_size(sectors, settled_, now_))
            return fmt::format("has {} sectors, a size that it was not given", sectors);
        Bytes bytes(image.size());
        if (const auto read = image.read({0}, bytes); !read) return "cannot be read: " + read.error().message();
        std::vector<std::uint64_t> zeros;  // that would be wrong in clusters that are not new
        for (std::uint64_t i = 0; i < sectors; ++i) {
            const auto value = value_in(i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
            found.push_back(value);
            if (history_.model.allows(i, value, settled_, now_)) continue;
            if (value != 0 || !history_.model.unsettled(i, settled_, now_))
                return history_.model.complaint(i, value, settled_, now_);
            zeros.push_back(i);
        }
        if (zeros.empty()) return std::nullopt;
        const auto durable_files = durable_();
        const auto durable = open_(durable_files, false);
        if (!durable) return "cannot be opened with nothing pending: " + durable.error().message();
        for (const auto i : zeros) {
            const auto before = place_of(**durable, durable_files, i);
            if (before && before == place_of(image, crashed, i))
                return history_.model.complaint(i, 0, settled_, now_) + ", in the cluster that it had before";
        }
        return std::nullopt;
    }

    /// Where a sector is stored: file and offset.
    static std::optional<std::string> place_of(Image& image, const Files& files, std::uint64_t sector) {
        const auto extent = sector * sector_bytes < image.size() ? image.extent({sector * sector_bytes}, sector_bytes)
                                                                 : Result<Extent>(Extent{});
        if (!extent || !extent->host || extent->kind != Extent::Kind::data) return std::nullopt;
        for (const auto& [name, storage] : files) {
            if (storage.get() == extent->storage) return fmt::format("{}@{}", name, extent->host->value);
        }
        return std::nullopt;
    }

    /// The guest comes back: writes, flushes, closes.
    std::optional<std::string> go_on(const Files& files, std::vector<Value>& found) {
        {
            const auto image = open_(files, true);
            if (!image) return "cannot be opened for writing: " + image.error().message();
            for (int i = 0; i < 3; ++i) {
                const auto sectors = (*image)->size() / sector_bytes;
                const auto first = random_.below(sectors);
                const auto count = random_.between(1, std::min<std::uint64_t>(40, sectors - first));
                constexpr Value after_the_crash = 0xabcdef;
                const auto wrote = (*image)->write({first * sector_bytes}, stamped(first, count, after_the_crash));
                if (!wrote) return "cannot be written: " + wrote.error().message();
                std::fill_n(found.begin() + static_cast<std::ptrdiff_t>(first), count, after_the_crash);
            }
            if (const auto flushed = (*image)->flush(); !flushed) return "no flush: " + flushed.error().message();
            if (const auto closed = (*image)->close(); !closed) return "no close: " + closed.error().message();
        }
        const auto image = open_(files, false);
        if (!image) return "cannot be opened again: " + image.error().message();
        if (auto corrupt = corruption(**image, files)) return "written on: " + *corrupt;
        Bytes bytes((*image)->size());
        if (const auto read = (*image)->read({0}, bytes); !read) return "not read again: " + read.error().message();
        for (std::uint64_t i = 0; i < found.size(); ++i) {
            const auto value = value_in(i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
            if (value != found[i])
                return fmt::format("written on: sector {} holds {}, no longer {}", i, value, found[i]);
        }
        return std::nullopt;
    }

    std::optional<std::string> qemu_finds(const Files& crashed) {
        const auto image = open_(crashed, false);
        if ((*image)->format() != Format::qcow2) return std::nullopt;
        const auto info = (*image)->info();
        if (!info || info->dirty) return std::nullopt;
        const TemporaryDirectory directory;
        save(crashed, directory.path());
        const auto checked = qemu_img({"check", "-f", "qcow2", image_name}, directory.path());
        if (checked.status == 0 || checked.status == 3) return std::nullopt;  // 3: leaks
        return checked.text();
    }

    History history_;
    Opener open_;
    Random& random_;
    std::function<Files()> durable_;
    Tick settled_ = 0;
    Tick now_ = 0;
};

}  // namespace qcow::test
