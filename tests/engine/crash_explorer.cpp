#include "engine/crash_explorer.h"

namespace qcow::test {

CrashReport CrashExplorer::explore(const CrashOptions& options) {
    CrashReport report;
    const auto plan = make_plan(options);
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
            report.violation = qemu_finds(crashed, report.qemu_checks);
        }
        if (!report.violation && options.return_every != 0 && i % options.return_every == 0) {
            const auto second = explore_return(crashed);
            report.states += second.states;
            report.again += second.states;
            report.violation = second.violation;
        }
        if (report.violation)
            *report.violation = fmt::format("power loss before event {} of {}, {}: {}", plan[i].now,
                                            history_.log.events().size(), plan[i].text(), *report.violation);
    }
    return report;
}

std::optional<std::string> CrashExplorer::judge_now(const Files& files) {
    now_ = history_.log.events().size();
    settled_ = history_.model.settled_at(now_);
    durable_ = [&] { return files; };
    return judge(files);
}

bool CrashExplorer::is_guest_data(const StorageEvent& event) {
    if (event.kind != StorageEvent::Kind::write) return true;  // or zeros
    for (std::size_t at = 0; at + sector_bytes <= event.bytes.size(); at += sector_bytes) {
        if (std::memcmp(&event.bytes[at], &event.bytes[at + 16], sector_bytes - 16) != 0) return false;
    }
    return true;
}

void CrashExplorer::add_nasty(std::size_t now, const std::vector<CrashStates::Pending>& pending,
                              std::vector<Case>& plan) {
    using Kind = Case::Kind;
    const auto n = pending.size();
    if (n <= 4) {
        for (std::uint64_t mask = 0; mask < 1U << n; ++mask) plan.push_back({now, Kind::mask, mask});
    } else {
        plan.push_back({now, Kind::none});
        plan.push_back({now, Kind::all});
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (n > 4) {
            plan.push_back({now, Kind::only, i});
            plan.push_back({now, Kind::without, i});
        }
        auto sectors = pending[i].sectors;
        if (sectors.size() < 2 || is_guest_data(history_.log.events()[pending[i].event])) continue;
        while (sectors.size() > 8)
            sectors.erase(sectors.begin() + static_cast<std::ptrdiff_t>(random_.between(1, sectors.size() - 2)));
        for (const auto sector : sectors) {
            for (const auto kind : {Kind::only_sector, Kind::without_sector, Kind::up_to_sector})
                plan.push_back({now, kind, i, sector});
        }
    }
}

std::vector<CrashExplorer::Case> CrashExplorer::make_plan(const CrashOptions& options) {
    using Kind = Case::Kind;
    const auto& events = history_.log.events();
    std::vector<Case> plan;
    std::vector<std::size_t> moments;
    CrashStates states(history_.log, history_.before);
    for (std::size_t now = 1; now <= events.size(); ++now) {
        const bool last = now == events.size();
        if (!last && events[now].kind == StorageEvent::Kind::mark) continue;
        moments.push_back(now);
        // Most is pending where a flush is about to end.
        if (!last && events[now].kind != StorageEvent::Kind::flush_end) continue;
        states.advance(now);
        add_nasty(now, states.pending(), plan);
    }
    if (options.most) {
        for (std::size_t i = plan.size(); i > 1; --i) std::swap(plan[i - 1], plan[random_.below(i)]);
        plan.resize(std::min<std::size_t>(plan.size(), *options.most));
    }
    for (unsigned i = 0; i < options.samples && !moments.empty(); ++i) {
        const auto kind = random_.chance(50) ? Kind::subset : Kind::torn;
        plan.push_back({random_.pick(moments), kind, random_.below(1'000'000'000)});
    }
    std::ranges::stable_sort(plan, {}, &Case::now);
    return plan;
}

Files CrashExplorer::build(const CrashStates& states, const Case& c) {
    using Kind = Case::Kind;
    const auto pending = states.pending();
    const auto index = [&](std::size_t event) {
        const auto found = std::ranges::lower_bound(pending, event, {}, &CrashStates::Pending::event);
        const bool changes = found != pending.end() && found->event == event;
        return changes ? static_cast<std::uint64_t>(found - pending.begin()) : ~std::uint64_t{0};
    };
    Random random(c.which);
    std::set<std::size_t> half;
    for (const auto& [event, sectors] : pending) {
        if (random.chance(50)) half.insert(event);
    }
    return states.build([&](std::size_t event, std::uint64_t sector) {
        const auto here = index(event) == c.which;
        switch (c.kind) {
            case Kind::none: return false;
            case Kind::all: return true;
            case Kind::only: return here;
            case Kind::without: return !here;
            case Kind::mask: return index(event) < 64 && (c.which >> index(event) & 1) != 0;
            case Kind::subset: return half.contains(event);
            case Kind::torn: return random.chance(50);
            case Kind::only_sector: return here && (sector == c.sector || sector == CrashStates::no_sector);
            case Kind::without_sector: return !here || sector != c.sector;
            case Kind::up_to_sector: return !here || sector <= c.sector || sector == CrashStates::no_sector;
        }
        return false;
    });
}

std::optional<std::string> CrashExplorer::judge(const Files& crashed) {
    const auto read_only = open_(crashed, false);
    if (!read_only) return "cannot be opened: " + read_only.error().message();
    std::uint64_t leaks = 0;
    if (auto corrupt = corruption(**read_only, crashed, history_.may_be_dirty, leaks)) return corrupt;
    if (auto wrong = compare(**read_only, crashed)) return wrong;
    if (auto harm = history_.kept.harm(**read_only, crashed, now_)) return harm;
    Return guest(found_.size());
    const auto files = copy_of(crashed);
    if (auto wrong = go_on(files, guest)) return "written on: " + *wrong;
    return ended_well(files, guest, leaks);
}

std::optional<std::string> CrashExplorer::corruption(Image& image, const Files& files, bool may_be_dirty,
                                                     std::uint64_t& leaks) {
    leaks = ~std::uint64_t{0};
    const auto info = image.info();
    if (!info) return "has no info: " + info.error().message();
    if (info->dirty) return may_be_dirty ? std::nullopt : std::optional<std::string>("has become dirty");
    const auto report = image.check({.workers = 1});
    if (!report) {
        if (report.error().code == Errc::unsupported && image.format() == Format::raw) return std::nullopt;
        return "cannot be checked: " + report.error().message();
    }
    leaks = report->leaks + report->counted_past_end;
    if (report->corruptions + report->errors == 0) return std::nullopt;
    std::string text = fmt::format("corrupt ({} bytes)", value_of(files.at(image_name)->size()));
    for (const auto& finding : report->findings) {
        if (finding.severity != CheckFinding::Severity::leak && text.size() < 500)
            text += "; " + finding.place + ": " + finding.what;
    }
    return text;
}

std::optional<std::string> CrashExplorer::compare(Image& image, const Files& crashed) {
    found_.clear();
    const auto sectors = image.size() / sector_bytes;
    if (!history_.model.allows_size(sectors, settled_, now_))
        return fmt::format("has {} sectors, a size that it was not given", sectors);
    Bytes bytes(image.size());
    if (const auto read = image.read({0}, bytes); !read) return "cannot be read: " + read.error().message();
    std::vector<std::uint64_t> zeros;  // that would be wrong in clusters that are not new
    for (std::uint64_t i = 0; i < sectors; ++i) {
        const auto value = value_in(i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
        found_.push_back(value);
        if (history_.model.allows(i, value, settled_, now_)) continue;
        if (value != 0 || !history_.model.unsettled(i, settled_, now_))
            return history_.model.complaint(i, value, settled_, now_);
        zeros.push_back(i);
    }
    if (zeros.empty()) return std::nullopt;
    const auto durable_files = durable_();
    const auto durable = open_(durable_files, false);
    if (!durable) return "cannot be opened with nothing pending: " + durable.error().message();
    const auto old = places_of(**durable, durable_files);
    for (const auto i : zeros) {
        const auto place = place_of(image, crashed, i);
        if (!place) return history_.model.complaint(i, 0, settled_, now_) + ", and no place of its own";
        if (old.contains(*place))
            return history_.model.complaint(i, 0, settled_, now_) + ", in a cluster that is not new";
    }
    return std::nullopt;
}

std::set<std::string> CrashExplorer::places_of(Image& image, const Files& files) {
    std::set<std::string> result;
    for (std::uint64_t i = 0; i < image.size() / sector_bytes; ++i) {
        if (auto place = place_of(image, files, i)) result.insert(*std::move(place));
    }
    return result;
}

std::optional<std::string> CrashExplorer::place_of(Image& image, const Files& files, std::uint64_t sector) {
    const auto extent = sector * sector_bytes < image.size() ? image.extent({sector * sector_bytes}, sector_bytes)
                                                             : Result<Extent>(Extent{});
    if (!extent || !extent->host || extent->kind != Extent::Kind::data) return std::nullopt;
    for (const auto& [name, storage] : files) {
        if (storage.get() == extent->storage) return fmt::format("{}@{}", name, extent->host->value);
    }
    return std::nullopt;
}

std::optional<std::string> CrashExplorer::go_on(const Files& files, Return& back) const {
    Files recorded;
    for (const auto& [name, storage] : files)
        recorded[name] = std::make_shared<RecordingStorage>(storage, name, back.log);
    const auto image = open_(recorded, true);
    if (!image) return "cannot be opened for writing: " + image.error().message();
    for (std::uint64_t i = 0; i < found_.size(); ++i) back.model.preset(i, found_[i]);
    constexpr Value after_the_crash = Value{1} << 40;
    Guest guest(**image, back.model, [&] { return back.log.mark(); }, history_.discards_read_as_zeros, after_the_crash);
    Worker worker(guest, history_.afterwards, Random(random_.below(~std::uint64_t{0})));
    for (int i = 0; i < 6; ++i) {
        if (const auto done = worker.step(); !done) return done.error().message();
    }
    if (const auto flushed = guest.flush(); !flushed) return "no flush: " + flushed.error().message();
    if (const auto closed = guest.close(); !closed) return "no close: " + closed.error().message();
    return std::nullopt;
}

std::optional<std::string> CrashExplorer::ended_well(const Files& files, const Return& back, std::uint64_t leaks) {
    const auto image = open_(files, false);
    if (!image) return "cannot be opened again: " + image.error().message();
    std::uint64_t leaks_now = 0;
    if (auto corrupt = corruption(**image, files, false, leaks_now)) return "written on: " + *corrupt;
    if (leaks_now > leaks && leaks_now != ~std::uint64_t{0})
        return fmt::format("written on: {} clusters leak, {} did before", leaks_now, leaks);
    Bytes bytes((*image)->size());
    if (const auto read = (*image)->read({0}, bytes); !read) return "not read again: " + read.error().message();
    const auto end = back.log.events().size();
    for (std::uint64_t i = 0; i < bytes.size() / sector_bytes; ++i) {
        const auto value = value_in(i, std::span(bytes).subspan(i * sector_bytes, sector_bytes));
        if (!back.model.allows(i, value, end, end)) return "written on: " + back.model.complaint(i, value, end, end);
    }
    if (auto harm = history_.kept.harm(**image, files, now_)) return "written on: " + *harm;
    return std::nullopt;
}

CrashReport CrashExplorer::explore_return(const Files& crashed) {
    Return back(found_.size());
    if (auto wrong = go_on(copy_of(crashed), back)) return {.violation = "written on again: " + *wrong};
    CrashExplorer second({back.log, crashed, back.model, history_.kept.at_any_time(), history_.may_be_dirty,
                          history_.afterwards, history_.discards_read_as_zeros},
                         open_, random_);
    return second.explore({.samples = 4, .most = 8, .return_every = 0});
}

std::optional<std::string> CrashExplorer::qemu_finds(const Files& crashed, unsigned& checks) {
    const auto image = open_(crashed, false);
    if ((*image)->format() != Format::qcow2) return std::nullopt;
    const auto info = (*image)->info();
    if (!info || info->dirty) return std::nullopt;
    ++checks;
    const TemporaryDirectory directory;
    save(crashed, directory.path());
    const auto checked = qemu_check(image_name, info->encryption.has_value(), directory.path());
    if (checked.status == 0 || checked.status == 3) return std::nullopt;  // 3: leaks
    return checked.text();
}

}  // namespace qcow::test
