#include "qcow/repair.h"

#include <fmt/format.h>

#include "base/within_memory.h"
#include "operation/metadata_files.h"
#include "qcow/text.h"
#include "qcow2/repair.h"

namespace qcow {

std::string text_of(const RepairLoss& loss) {
    switch (loss.what) {
        case RepairLoss::What::guest_data:
            return fmt::format("{} guest bytes from {:#x} on{} are lost and will {}: {}", loss.length, loss.guest.value,
                               loss.in_snapshots ? " in snapshots" : "",
                               loss.reads_as_zeros ? "read as zeros" : "show what the backing file has",
                               printable(loss.why));
        case RepairLoss::What::snapshot:
            if (loss.name.empty()) return fmt::format("internal snapshots are lost: {}", printable(loss.why));
            return fmt::format("internal snapshot \"{}\" is lost: {}", printable(loss.name), printable(loss.why));
        case RepairLoss::What::bitmap:
            if (loss.name.empty()) return fmt::format("bitmaps are lost: {}", printable(loss.why));
            return fmt::format("bitmap \"{}\" is lost: {}", printable(loss.name), printable(loss.why));
    }
    return "";
}

Result<RepairResult> repair(const ImageSpec& spec, const RepairOptions& options) {
    return within_memory([&]() -> Result<RepairResult> {
        const auto& path = spec.location.path;
        if (options.remove_inconsistent_bitmaps && options.what != RepairOptions::What::all) {
            return fail(Errc::invalid_argument, path,
                        "a repair of leaks does not remove bitmaps; repair everything (-r all) to remove them");
        }
        auto files = TRY(open_metadata_files(spec, !options.dry_run, "repaired"));
        qcow2::FindCipher cipher;
        if (spec.keys) cipher = [&](const Storage& image) { return find_cipher(spec, image); };
        auto result = TRY(qcow2::repair_image(files.image, files.data.get(), options, cipher, is_device(spec)));
        files = {};  // its lock
        auto reading = spec;
        reading.write.reset();
        reading.keys = {};  // nobody reads the data
        if (const auto examined = open_to_examine(reading, options.control.warn)) {
            add_broken_chain(result.before, examined->broken_chain);
            add_broken_chain(result.after, examined->broken_chain);
        }
        return result;
    });
}

}  // namespace qcow
