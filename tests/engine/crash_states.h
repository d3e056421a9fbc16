#pragma once
// What a power loss may leave of the files of a StorageLog.

#include <functional>
#include <map>
#include <set>

#include "support/memory_files.h"
#include "support/recording.h"

namespace qcow::test {

/// The files as they may be found after a power loss at one moment of a log, which can only be moved on. What was
/// complete before a flush that ended began is there. Of everything else each sector of 512 bytes may have arrived in
/// any of the versions that it had since, whatever became of its neighbours; and so may the length of the file.
class CrashStates {
public:
    CrashStates(const StorageLog& log, const Files& before);

    /// To the moment before event `now`.
    void advance(std::size_t now);

    /// An event whose effects may be missing.
    struct Pending {
        std::size_t event = 0;
        std::vector<std::uint64_t> sectors;  ///< of its file, that it changed; none: only the file's length
    };

    /// Those that changed something, in order.
    [[nodiscard]] std::vector<Pending> pending() const;

    static constexpr std::uint64_t no_sector = ~std::uint64_t{0};

    /// The state in which exactly those sectors of those events have arrived that are chosen. Lengths of files are
    /// asked for with `no_sector`.
    using Arrived = std::function<bool(std::size_t event, std::uint64_t sector)>;
    [[nodiscard]] Files build(const Arrived& arrived) const;

private:
    static constexpr std::uint64_t sector_bytes = 512;

    template <class Contents>
    struct Version {
        std::size_t event = 0;
        Contents bytes;
        bool lost = false;  // a flush of it failed: later ones no longer make it durable
    };

    struct File {
        Bytes now;
        Bytes durable;
        std::map<std::uint64_t, std::vector<Version<Bytes>>> pending;  // by sector
        std::vector<Version<std::uint64_t>> pending_sizes;
    };

    template <class Contents>
    static const Version<Contents>* latest(const std::vector<Version<Contents>>& versions, std::uint64_t sector,
                                           const Arrived& arrived) {
        for (auto it = versions.rbegin(); it != versions.rend(); ++it) {
            if (arrived(it->event, sector)) return &*it;
        }
        return nullptr;
    }

    static Bytes durable_sector(const File& file, std::uint64_t sector);

    void apply(const StorageEvent& event);

    void write(File& file, std::uint64_t at, const Bytes& bytes);

    /// Notes the present contents of these sectors as a version.
    void touch(File& file, std::uint64_t begin, std::uint64_t end);

    void resize(File& file, std::uint64_t size);

    static void flush(File& file, std::size_t begun);

    /// The newest version of what that flush covers; it and what is older are no longer pending.
    template <class Contents>
    static std::optional<Contents> settle(std::vector<Version<Contents>>& versions, std::size_t begun) {
        const auto last = std::find_if(versions.rbegin(), versions.rend(),
                                       [&](const auto& version) { return version.event < begun && !version.lost; });
        if (last == versions.rend()) return std::nullopt;
        auto result = std::move(last->bytes);
        versions.erase(versions.begin(), last.base());
        return result;
    }

    static void lose(File& file, std::size_t begun);

    const StorageLog& log_;
    std::size_t at_ = 0;
    std::map<std::string, File> files_;
};

}  // namespace qcow::test
