#include "qcow/check.h"

#include "base/within_memory.h"
#include "operation/metadata_files.h"
#include "qcow/image_spec.h"

namespace qcow {

Result<CheckResult> check(const ImageSpec& spec, const CheckOptions& options) {
    return within_memory([&]() -> Result<CheckResult> {
        const auto [image, broken_chain] = TRY(open_to_examine(spec, options.control.warn));
        auto report = image->check(options);
        if (!report) {
            auto error = std::move(report).error();
            return std::unexpected(error.place.empty() ? std::move(error).in(spec.location.path) : std::move(error));
        }
        add_broken_chain(*report, broken_chain);
        if (is_device(spec)) report->compact_bytes = 0;
        return CheckResult{image->format(), *std::move(report)};
    });
}

}  // namespace qcow
