#include "qcow/check.h"

#include "base/within_memory.h"
#include "qcow/image_spec.h"

namespace qcow {

Result<CheckResult> check(const ImageSpec& spec, const CheckOptions& options) {
    return within_memory([&]() -> Result<CheckResult> {
        auto image = open_image(spec, options.control.warn);
        std::optional<CheckFinding> broken_chain;
        if (!image && image.error().code == Errc::no_memory) return std::unexpected(std::move(image).error());
        if (!image) {
            // The image itself may be sound, or worth a diagnosis.
            auto alone = spec;
            alone.follow = false;
            auto opened = open_image(alone, options.control.warn);
            if (!opened) return std::unexpected(std::move(image).error());
            broken_chain.emplace(CheckFinding::Severity::error, "backing chain", image.error().message(),
                                 CheckFinding::Kind::backing_chain);
            image = std::move(opened);
        }
        auto report = (*image)->check(options);
        if (!report) {
            auto error = std::move(report).error();
            return std::unexpected(error.place.empty() ? std::move(error).in(spec.location.path) : std::move(error));
        }
        if (broken_chain) {
            ++report->errors;
            report->findings.insert(report->findings.begin(), *std::move(broken_chain));
        }
        return CheckResult{(*image)->format(), *std::move(report)};
    });
}

}  // namespace qcow
