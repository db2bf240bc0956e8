// Whether GPU code was built in and torch has the runtime that it needs.
#pragma once

namespace gptcore {

bool gpu_present();

}  // namespace gptcore
